"""The command line: LightningCLI, with ``fit`` driven block by block, and plain verbs beside it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from aq_lightning.calibration import Cause, RunDirectory
from aq_lightning.comparison import Comparison
from aq_lightning.conversion import describe
from aq_lightning.data import TokenWindows
from aq_lightning.deploy.prompts import Prompts
from aq_lightning.disk import check_space
from aq_lightning.errors import Interrupted, ParityError, RequestError
from aq_lightning.evaluation import Row, check_reference, render, render_scores
from aq_lightning.fingerprint import fingerprint
from aq_lightning.language_model import QuantizedLanguageModel
from aq_lightning.models.loading import Pretrained, load, load_tokenizer
from aq_lightning.nulls import refuse_nulls
from aq_lightning.pipeline import Guards, Job, quantize
from aq_lightning.plan import Probe, plan_lines
from aq_lightning.preparation import prepare
from aq_lightning.quiet import quiet
from aq_lightning.scorecard import Scorecard, as_data
from aq_lightning.scoring import Opening
from aq_lightning.verbs import BY_NAME, VERBS

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
_OPTIONS = {"fit": Guards, "test": Scorecard, "predict": Prompts}  # subcommand → its own, beside model, data, trainer


class CommandLine(LightningCLI):
    """``fit`` calibrates a model, ``test`` scores one, ``predict`` lets one speak.

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
            parser_kwargs=_PARSER | {name: _PARSER | {"options": own} for name, own in _OPTIONS.items()},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What runs, and which arguments of the Trainer's method of that name are not for the command line."""
        internal = {"model", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": {*internal, "train_dataloaders", "val_dataloaders"},
            "test": {*internal, "dataloaders", "verbose"},
            "predict": {*internal, "dataloaders", "return_predictions"},
        }

    def init_parser(self, options: type | None = None, **settings: object) -> LightningArgumentParser:
        """A parser, which takes the options of its subcommand too."""
        parser = super().init_parser(**settings)
        if options is Scorecard:
            Scorecard.add_to(parser)
        elif options is not None:
            parser.add_class_arguments(options, as_group=False)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str | None, default=None, help="directory for everything that is written")
        parser.link_arguments("model.pretrained", "data.pretrained")

    def instantiate_classes(self) -> None:
        refuse_nulls(QuantizedLanguageModel, vars(self._section.model), "model.")
        refuse_nulls(TokenWindows, vars(self._section.data), "data.")
        if self.subcommand == "fit":
            refuse_nulls(Guards, vars(self._section), "")
        super().instantiate_classes()

    def instantiate_trainer(self, **changes: object) -> Trainer:
        """A fresh Trainer from the configuration, ``changes`` winning; bfloat16 autocast on a GPU unless told."""
        if self._section.trainer.precision is None:
            gpu = torch.cuda.is_available() and self._section.trainer.accelerator != "cpu"
            changes.setdefault("precision", "bf16-mixed" if gpu else "32-true")
        try:
            trainer = super().instantiate_trainer(**{"logger": False, **changes})
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise RequestError(f"The options of trainer: are Lightning's, got one it refuses: {error}") from error
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
        guards = Guards(self._section.resume, self._section.save_every, self._section.keep_streams)
        run = RunDirectory.check(Path(self._section.out), configuration, guards.resume)
        if run.results is not None:
            print(f"{run.path} is finished: nothing is left to do.")
        else:
            for kind in model.references:
                check_reference(kind, self.trainer.strategy.root_device)
            self._calibrate(model, datamodule, run, guards)
        print(render([Row(**row) for row in run.results["rows"]]))
        blocks = [b for b in run.results["blocks"] if b["attempts"] and b["outcome"] != "trained"]
        if blocks:
            kept = ", ".join(f"{block['block']} ({block['outcome']})" for block in blocks)
            print(f"training did not help, so these blocks were left as named: {kept}")
        for cause in (Cause(**each) for block in run.results["blocks"] for each in block["causes"]):
            print(f"an attempt was stopped, {cause}")
        print(f"checkpoint: {run.checkpoint}\nchecked: {run.results['parity']}")

    def test(self, model: QuantizedLanguageModel, datamodule: TokenWindows) -> None:
        """Scores ``--model.pretrained`` or all of ``--compare``; with ``--out``, writes ``test.json`` there too."""
        place, code = model.recipe.streams.place, model.trust_remote_code
        card = Scorecard.of(self._section)
        opening = Opening(self.trainer.strategy.root_device, place, card.loader, code)
        table = []
        for scored in card.score(model.pretrained, opening, datamodule):
            print(f"{scored.model}: scored as read by {scored.reader}", flush=True)
            table.append(scored)
        if self._section.out is not None:
            out = Path(self._section.out)
            out.mkdir(parents=True, exist_ok=True)
            (out / "test.json").write_text(json.dumps(as_data(table), indent=2))
        print(render_scores(table))

    def predict(self, model: QuantizedLanguageModel, datamodule: TokenWindows) -> None:
        """Answers ``--prompt``, or every line of ``--prompts``, with ``--model.pretrained``, quantized or not."""
        prompts = Prompts(**{field.name: self._section[field.name] for field in fields(Prompts)})
        for text in prompts.answers(model.pretrained, self.trainer.strategy.root_device, model.trust_remote_code):
            print(text, end="", flush=True)

    def _calibrate(
        self, model: QuantizedLanguageModel, datamodule: TokenWindows, run: RunDirectory, guards: Guards
    ) -> None:
        """From the checks to the table."""
        prepared = prepare(model)
        model.recipe = prepared.recipe
        print("\n".join(prepared.notes), end="\n" if prepared.notes else "")
        datamodule.attach_tokenizer(load_tokenizer(prepared.source, model.trust_remote_code))
        windows = {"calibration": datamodule.calibration(), "evaluation": datamodule.evaluation()}
        revision = getattr(prepared.config, "_commit_hash", None)
        use = prepared.disk(windows["calibration"].numel() if guards.keep_streams else 0)
        identity = fingerprint(prepared.source, revision, windows, self.trainer.strategy.root_device.type)
        run.check_fingerprint(identity)
        free = check_space(use, run.path)
        pretrained = load(model.pretrained, model.trust_remote_code)
        if pretrained.whole:
            print(f"note: all of the model stays in host memory. {pretrained.whole}", flush=True)
        try:
            with run.lock(), guards.stopping.listening():
                print(f"{use}; {free / 1e9:.1f} GB are free", flush=True)
                run.create(self._configuration(), identity)
                for damaged in run.repair():
                    print(f"damaged, and made again: {damaged}", flush=True)
                run.finish(self._results(pretrained, model, datamodule, run, guards))
        except (OSError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            raise Interrupted(
                f"stopped by a fault ({type(error).__name__}: {reason}); what is finished is safe in {run.path}: make "
                "room or mend what failed, and the same command goes on."
            ) from error

    def _results(
        self,
        pretrained: Pretrained,
        model: QuantizedLanguageModel,
        datamodule: TokenWindows,
        run: RunDirectory,
        guards: Guards,
    ) -> dict[str, object]:
        loggers = self._loggers(run.path)
        comparison = Comparison(datamodule.test_dataloader(), self.instantiate_trainer, model.recipe.streams.place)

        def baselines() -> dict[str, object]:
            rows = comparison.baselines(pretrained, model.recipe.scheme)
            rows += comparison.references(pretrained, model.references)
            return {"rows": [row.as_dict() for row in rows]}

        rows = run.remembered("baselines", baselines)["rows"]
        job = Job(
            pretrained,
            model.recipe,
            run,
            lambda root: self.instantiate_trainer(default_root_dir=str(root), logger=loggers),
            self.trainer.strategy.root_device,
            datamodule.seed,
            guards,
        )
        quantize(job, datamodule.calibration())
        method = Path(str(self._section.config[0])).stem
        rows = [*rows, comparison.checkpoint(str(run.checkpoint), method).as_dict()]
        verdict = describe(run.checkpoint, model.pretrained, str(model.recipe.scheme), rows)
        run.seal_checkpoint()  # again, with its card
        return {"rows": rows, "blocks": run.all_metrics(), "parity": verdict}

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
        for each in ("config", "out", *(field.name for field in fields(Guards) if field.init)):
            del section[each]
        return self._parser(self.subcommand).dump(section, skip_none=False, skip_validation=True)

    @property
    def _section(self):
        """The parsed configuration of the running subcommand."""
        return self.config[self.subcommand]


class PlanningLine(CommandLine):
    """``plan`` takes the arguments of ``fit``, and says what that would do and cost."""

    def fit(self, model: QuantizedLanguageModel, datamodule: TokenWindows) -> None:
        prepared = prepare(model)
        samples, length = datamodule.calibration_shape
        probe = Probe(prepared, self.trainer.strategy.root_device, length)
        with TemporaryDirectory() as scratch:
            measured = probe.measure(self.instantiate_trainer(max_epochs=1, default_root_dir=scratch))
        for line in plan_lines(prepared, measured, (samples, length), self._section.trainer.max_epochs):
            print(line)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a request that cannot be granted ends in one sentence and exit code 2, an interrupted run in one and
    75 (``EX_TEMPFAIL``): the same command goes on."""
    quiet()
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if verb in VERBS:
            sys.exit(auto_cli(VERBS[verb], args=rest, prog=f"train.py {verb}", as_positional=verb not in BY_NAME))
        if verb == "plan":
            PlanningLine(["fit", *rest])
        else:
            CommandLine(arguments)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
