"""The command line: LightningCLI, with ``fit`` driven block by block, and plain verbs beside it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from aq_lightning import distributed
from aq_lightning.calibration import Guards, RunDirectory, open_run, rotated
from aq_lightning.comparison import Comparison
from aq_lightning.conversion import describe
from aq_lightning.data import TokenWindows
from aq_lightning.deploy.prompts import Prompts
from aq_lightning.disk import beside, check_space
from aq_lightning.errors import Interrupted, RequestError
from aq_lightning.evaluation import check_reference, render_scores
from aq_lightning.fingerprint import check_alike, fingerprint
from aq_lightning.language_model import QuantizedLanguageModel
from aq_lightning.models.loading import Pretrained, load, load_tokenizer
from aq_lightning.nulls import refuse_nulls
from aq_lightning.pipeline import Job, quantize
from aq_lightning.plan import Probe, plan_lines
from aq_lightning.preparation import Prepared, check_tuning, prepare
from aq_lightning.rotating import Rotating
from aq_lightning.scorecard import Scorecard, as_data
from aq_lightning.scoring import Opening
from aq_lightning.strategy import alone, begin, check_shares, check_start, check_steps, check_trainer, replicas, wished
from aq_lightning.summary import Log, draw, program, say, summary_lines
from aq_lightning.vigil import Vigil
from aq_lightning.writing import Writing

_TRAINER_DEFAULTS = {  # one block is one fit: its Trainer is silent, and the displays in callbacks/ span all blocks
    "devices": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
_PARSER = {"default_env": False, "allow_abbrev": False}  # a shortened option would pass for a misspelt one
_OPTIONS = {"fit": Guards, "test": Scorecard, "predict": Prompts}  # subcommand → its own, beside model, data, trainer


class CommandLine(LightningCLI):
    """``fit`` calibrates a model, ``test`` scores one, ``predict`` lets one speak.

    A fresh Trainer made from the ``trainer:`` section serves each window of blocks, with the same callbacks and
    loggers throughout.
    """

    def __init__(self, arguments: list[str] | None = None, called: bool = True) -> None:
        self._called = called
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
        if options is Guards:
            parser.add_argument("--report", type=bool, default=True, help="whether RUN/report.html is written")
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
            strategy = replicas(trainer.strategy, self.subcommand)
            if strategy is not None:
                trainer = super().instantiate_trainer(**{"logger": False, **changes, "strategy": strategy})
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise RequestError(f"The options of trainer: are Lightning's, got one it refuses: {error}") from error
        check_trainer(trainer)
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
        strategy, samples = self.trainer.strategy, datamodule.calibration_shape[0]
        ranks, rank = check_start(strategy, self._called)
        check_steps(ranks, samples, model.recipe.batch_size, self._section.trainer.accumulate_grad_batches)
        if model.recipe.tuning is not None:
            check_shares(ranks, model.recipe.batch_size, model.recipe.tuning.batch_size)
        run = open_run(Path(self._section.out), configuration, guards.resume, ranks, rank)
        begin(strategy)
        with Vigil():
            if not distributed.from_first(distributed.leads() and run.results is not None):
                for kind in model.references:
                    check_reference(kind, strategy.root_device)
                self._calibrate(model, datamodule, run, guards)
            elif distributed.leads():
                print(f"{run.path} is finished: nothing is left to do.")
        if distributed.leads():
            if self._section.report:
                draw(run.path)
            print("\n".join(summary_lines(run.path, run.results or {}, program())))

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
        check_tuning(prepared, datamodule.calibration_shape[1], self.trainer.strategy.root_device)
        model.recipe = prepared.recipe
        print("".join(f"{note}\n" for note in prepared.notes), end="")
        datamodule.attach_tokenizer(load_tokenizer(prepared.source, model.trust_remote_code))
        windows = {"calibration": datamodule.calibration(), "evaluation": datamodule.evaluation()}
        revision = getattr(prepared.config, "_commit_hash", None)
        samples, length = datamodule.calibration_shape
        use = prepared.disk(samples if guards.keep_streams else 0, length)
        identity = fingerprint(prepared.source, revision, windows, self.trainer.strategy.root_device.type)
        if distributed.leads():
            run.check_fingerprint(identity)
            check_space(use, run.path)
        check_alike(identity)
        pretrained = load(model.pretrained, model.trust_remote_code)
        if pretrained.whole:
            print(f"note: all of the model stays in host memory. {pretrained.whole}", flush=True)
        try:
            with run.lock() if distributed.leads() else nullcontext(), guards.stopping.listening():
                if distributed.leads():
                    print(f"{use}; {check_space(use, run.path) / 1e9:.1f} GB are free", flush=True)
                    run.create(self._configuration(), identity)
                for damaged in run.repair():
                    print(f"damaged, and made again: {damaged}", flush=True)
                results = self._results(prepared, pretrained, model, datamodule, run, guards)
                if distributed.leads():
                    run.finish(results)
        except (OSError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            raise Interrupted(
                f"stopped by a fault ({type(error).__name__}: {reason}); what is finished is safe in {run.path}: make "
                "room or mend what failed, and the same command goes on."
            ) from error

    def _results(
        self,
        prepared: Prepared,
        pretrained: Pretrained,
        model: QuantizedLanguageModel,
        datamodule: TokenWindows,
        run: RunDirectory,
        guards: Guards,
    ) -> dict[str, object]:
        loggers = self._loggers(run.path) if distributed.leads() else False
        comparison = Comparison(datamodule.test_dataloader(), self._scoring_trainer, model.recipe.streams.place)

        def baselines() -> dict[str, object]:
            say("scoring the model as it is, and rounded to nearest")
            rows = comparison.baselines(pretrained, model.recipe.scheme)
            rows += comparison.references(pretrained, model.references)
            return {"rows": [row.as_dict() for row in rows]}

        rows = run.remembered("baselines", baselines)["rows"]
        trainer, windows = self._scoring_trainer, datamodule.calibration()
        stage = Rotating(pretrained, model.recipe, run, trainer, guards.stopping, datamodule.seed)
        turned = rotated(pretrained, stage.rotation(windows))
        more = Writing(turned, model.recipe, run, self.trainer.strategy.root_device, datamodule.seed).windows(windows)
        job = Job(
            turned,
            model.recipe,
            run,
            lambda root, **more: self.instantiate_trainer(default_root_dir=str(root), logger=loggers, **more),
            self.trainer.strategy.root_device,
            datamodule.seed,
            guards,
            Log(model.recipe.tuning is not None).window,
        )
        quantize(job, windows, more)
        if not distributed.leads():
            return {}
        method = Path(str(self._section.config[0])).stem
        say("scoring the result")
        rows = [*rows, comparison.checkpoint(str(run.checkpoint), method).as_dict()]
        verdict = describe(run.checkpoint, model.pretrained, str(model.recipe.scheme), rows)
        run.seal_checkpoint()  # again, with its card
        told = {"sites": prepared.places(), "notes": prepared.notes}
        return {"rows": rows, "blocks": run.all_metrics(), "tuning": run.tuning(), "parity": verdict, **told}

    def _scoring_trainer(self, **changes: object) -> Trainer:
        """A Trainer for this process alone."""
        return self.instantiate_trainer(**alone(self.trainer.strategy), **changes)

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
        for each in ("config", "out", "report", *(field.name for field in fields(Guards) if field.init)):
            del section[each]
        return self._parser(self.subcommand).dump(section, skip_none=False, skip_validation=True)

    @property
    def _section(self):
        """The parsed configuration of the running subcommand."""
        return self.config[self.subcommand]


class PlanningLine(CommandLine):
    """``plan`` takes the arguments of ``fit``, and says what that would do and cost, on one of its devices."""

    def instantiate_trainer(self, **changes: object) -> Trainer:
        return super().instantiate_trainer(**{"devices": 1, "num_nodes": 1, "strategy": "auto", **changes})

    def fit(self, model: QuantizedLanguageModel, datamodule: TokenWindows) -> None:
        prepared = prepare(model)
        (samples, length), section = datamodule.calibration_shape, self._section.trainer
        check_tuning(prepared, length, self.trainer.strategy.root_device)
        ranks = wished(section.devices, section.num_nodes)
        check_steps(ranks, samples, model.recipe.batch_size, section.accumulate_grad_batches)
        probe = Probe(prepared, self.trainer.strategy.root_device, length, ranks)
        with TemporaryDirectory(prefix=".plan-", dir=beside(Path(self._section.out or "run"))) as scratch:
            trainer = self.instantiate_trainer(max_epochs=probe.epochs, default_root_dir=scratch)
            measured = probe.measure(trainer, Path(scratch) / "run")
        shape, kept = (samples, length), self._section.keep_streams
        print(*plan_lines(prepared, measured, shape, section.max_epochs, ranks, kept), sep="\n")
