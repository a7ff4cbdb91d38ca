"""The command line: LightningCLI, with ``fit`` driven block by block, and plain verbs beside it."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from aq_lightning.calibration import Cause, RunDirectory, adapt, attach
from aq_lightning.comparison import Comparison
from aq_lightning.data import TokenWindows
from aq_lightning.doctor import examine
from aq_lightning.errors import RequestError
from aq_lightning.evaluation import Row, check_reference, overhead_lines, render
from aq_lightning.language_model import QuantizedLanguageModel
from aq_lightning.models.loading import (
    EMBEDDED,
    Pretrained,
    load,
    load_config,
    load_tokenizer,
    locate,
    skeleton,
    storage_of,
)
from aq_lightning.models.lookup import architecture_of, heads_of
from aq_lightning.pipeline import Job, quantize

_TRAINER_DEFAULTS = {  # one block is one fit: its Trainer is silent, and the displays in callbacks/ span all blocks
    "devices": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")  # others would cast the transforms
_PARSER = {"default_env": False, "allow_abbrev": False}  # a shortened option would pass for a misspelt one


class CommandLine(LightningCLI):
    """``fit`` calibrates a model, ``test`` scores one.

    A fresh Trainer made from the ``trainer:`` section serves each window of blocks, with the same callbacks and
    loggers throughout.
    """

    def __init__(self, arguments: list[str] | None = None) -> None:
        super().__init__(
            QuantizedLanguageModel,
            TokenWindows,
            args=arguments,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=None,
            trainer_defaults=_TRAINER_DEFAULTS,
            parser_kwargs={**_PARSER, "fit": _PARSER, "test": _PARSER},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What runs, and which arguments of the Trainer's method of that name are not for the command line."""
        internal = {"model", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": {*internal, "train_dataloaders", "val_dataloaders"},
            "test": {*internal, "dataloaders", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str | None, default=None, help="directory for everything that is written")
        parser.link_arguments("model.pretrained", "data.pretrained")

    def instantiate_trainer(self, **changes: object) -> Trainer:
        """A fresh Trainer from the configuration, ``changes`` winning; bfloat16 autocast on a GPU unless told."""
        if self._section.trainer.precision is None:
            gpu = torch.cuda.is_available() and self._section.trainer.accelerator != "cpu"
            changes.setdefault("precision", "bf16-mixed" if gpu else "32-true")
        trainer = super().instantiate_trainer(**{"logger": False, **changes})
        if trainer.world_size > 1:
            raise RequestError(f"Calibration runs on 1 device, got {trainer.world_size}: set --trainer.devices 1.")
        if trainer.strategy.root_device.type not in ("cpu", "cuda"):
            raise RequestError(
                f"Transforms need a device with float64, got {trainer.strategy.root_device}: "
                "set --trainer.accelerator cpu."
            )
        if trainer.precision not in _PRECISIONS:
            raise RequestError(
                f"Blocks are trained in {', '.join(_PRECISIONS)} (transforms stay in float64), "
                f"got {trainer.precision}: set --trainer.precision to one of them."
            )
        return trainer

    def fit(self, model: QuantizedLanguageModel, datamodule: TokenWindows) -> None:
        """Calibrates into the run directory ``--out`` and prints what was gained."""
        configuration = self._configuration()
        if self._section.config is None or self._section.out is None:
            raise RequestError(
                "fit needs a method and a place: add --config configs/affinequant.yaml (or another) and --out RUN."
            )
        epochs = self._section.trainer.max_epochs
        if epochs is None or epochs < 0:
            raise RequestError(f"A block is fitted for 0 or more epochs, got {epochs}: set --trainer.max_epochs.")
        if self._section.trainer.gradient_clip_val is not None and "fused: true" in configuration:
            raise RequestError(
                "Gradients of a fused optimizer cannot be clipped under mixed precision: "
                "add --model.optimizer.init_args.fused false."
            )
        run = RunDirectory.check(Path(self._section.out), configuration)
        if run.results is None:
            for kind in model.references:
                check_reference(kind, self.trainer.strategy.root_device)
            _check(model, datamodule)
            pretrained = load(model.pretrained, model.trust_remote_code)
            run.create(configuration)
            results = self._calibrate(pretrained, model, datamodule, run)
            run.finish(results)
        print(render([Row(**row) for row in run.results["rows"]]))
        blocks = [b for b in run.results["blocks"] if b["attempts"] and b["outcome"] != "trained"]
        if blocks:
            kept = ", ".join(f"{block['block']} ({block['outcome']})" for block in blocks)
            print(f"training did not help, so these blocks were left as named: {kept}")
        for cause in (Cause(**each) for block in run.results["blocks"] for each in block["causes"]):
            print(f"an attempt was stopped, {cause}")
        print(f"checkpoint: {run.checkpoint}")

    def test(self, model: QuantizedLanguageModel, datamodule: TokenWindows) -> None:
        """Scores ``--model.pretrained``, quantized or not; with ``--out``, writes ``test.json`` there too."""
        source = locate(model.pretrained)
        datamodule.attach_tokenizer(load_tokenizer(source, model.trust_remote_code))
        comparison = Comparison(datamodule.test_dataloader(), self.instantiate_trainer)
        row = comparison.checkpoint(model.pretrained, model.pretrained, model.trust_remote_code)
        if self._section.out is not None:
            out = Path(self._section.out)
            out.mkdir(parents=True, exist_ok=True)
            (out / "test.json").write_text(json.dumps({"rows": [row.as_dict()]}, indent=2))
        print(render([row]))

    def _calibrate(
        self, pretrained: Pretrained, model: QuantizedLanguageModel, datamodule: TokenWindows, run: RunDirectory
    ) -> dict[str, object]:
        loggers = self._loggers(run.path)
        comparison = Comparison(datamodule.test_dataloader(), self.instantiate_trainer)
        rows = comparison.baselines(pretrained, model.recipe.scheme)
        rows += comparison.references(pretrained, model.references)
        job = Job(
            pretrained,
            model.recipe,
            run,
            lambda root: self.instantiate_trainer(default_root_dir=str(root), logger=loggers),
            self.trainer.strategy.root_device,
            datamodule.seed,
        )
        quantize(job, datamodule.calibration())
        method = Path(str(self._section.config[-1])).stem
        rows.append(comparison.checkpoint(str(run.checkpoint), method))
        return {"rows": [row.as_dict() for row in rows], "blocks": run.all_metrics()}

    def _loggers(self, path: Path) -> list[Logger] | Logger | bool:
        """The configured loggers; unless told otherwise, CSV and TensorBoard files in ``RUN/logs``."""
        configured = self.config_init[self.subcommand].trainer.logger
        if configured is not None:
            return configured
        table = CSVLogger(path, name="logs")
        return [table, TensorBoardLogger(path, name="logs", version=table.version)]

    def _configuration(self) -> str:
        """The resolved configuration, as YAML that replays the run."""
        section = self._section.clone()
        del section["config"], section["out"]
        return self._parser(self.subcommand).dump(section, skip_none=False, skip_validation=True)

    @property
    def _section(self):
        """The parsed configuration of the running subcommand."""
        return self.config[self.subcommand]


def doctor(model: str = EMBEDDED, trust_remote_code: bool = False) -> int:
    """Prints what folds at each site of a model and the measured float64 error of every transform, with random
    parameters, on its first block.

    Args:
        model: directory with safetensors or GGUF, hub id, or ``embedded``.
        trust_remote_code: whether code from the hub may run.

    Returns:
        Exit code: 0 if every transform is exact, 1 otherwise.

    Raises:
        RequestError: the model or its architecture is not known.
    """
    pretrained = load(model, trust_remote_code)
    print(f"{pretrained.model.config.model_type}: {len(pretrained.blocks)} blocks, {pretrained.heads}")
    findings = []
    for finding in examine(pretrained):
        print(finding, flush=True)
        findings.append(finding)
    wrong = [finding for finding in findings if not finding.exact and not finding.refusal]
    print(f"{len(wrong)} of {len(findings)} are NOT EXACT" if wrong else "everything that folds is exact")
    return 1 if wrong else 0


def _check(model: QuantizedLanguageModel, datamodule: TokenWindows) -> None:
    """Everything that can be refused before weights are read and files are written; adapts the recipe if asked, and
    prints what it costs at run time."""
    source = locate(model.pretrained)
    config = load_config(source, model.trust_remote_code)
    if not source.gguf_file and getattr(config, "quantization_config", None) is not None:
        raise RequestError(
            f"A model to calibrate has full-precision weights, got {model.pretrained!r}, which is quantized already: "
            "name the original."
        )
    architecture = architecture_of(config)
    blocks = skeleton(config).get_submodule(architecture.blocks)
    block, recipe = blocks[0], model.recipe
    heads = heads_of(config, architecture)
    if model.adapt:
        folding, refusals = adapt(block, architecture, heads, recipe.transforms, recipe.scheme)
        model.recipe = recipe = replace(recipe, transforms=folding)
        for refusal in refusals:
            print(f"left out: {refusal}")
    storage = storage_of(source, config)
    quantizer, scheme = recipe.weight_quantizer, recipe.scheme
    attached = attach(block, architecture, heads, recipe.transforms, quantizer, scheme, storage)
    if architecture.experts and model.references:
        raise RequestError("References stand for linears alone, got a model with experts: leave out model.references.")
    if architecture.experts and not scheme.weight.symmetric:
        print(f"note: transformers and vLLM read experts of symmetric schemes only, such as {scheme}sym")
    datamodule.attach_tokenizer(load_tokenizer(source, model.trust_remote_code))
    datamodule.calibration()
    datamodule.evaluation()
    for line in overhead_lines(block, attached.carriers, len(blocks), torch.finfo(storage).bits):
        print(line)


def _quiet() -> None:
    """Silences what Lightning says once per Trainer, of which there is one per block."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*Checkpoint directory .* exists.*",
        ".*LeafSpec.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen blocks belong in eval mode
    ):
        warnings.filterwarnings("ignore", message)


_VERBS = {"doctor": doctor}
"""Plain functions beside LightningCLI: they fit nothing, and ask only for what they use."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a request that cannot be granted ends in one sentence and exit code 2."""
    _quiet()
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if verb in _VERBS:
            sys.exit(auto_cli(_VERBS[verb], args=rest, prog=f"train.py {verb}"))
        CommandLine(arguments)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
