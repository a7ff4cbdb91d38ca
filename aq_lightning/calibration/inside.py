"""Checkpoints inside a window at work, so that a killed run loses a few steps and not a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from aq_lightning import distributed
from aq_lightning.calibration.batches import Pairs
from aq_lightning.calibration.block import Position
from aq_lightning.calibration.interruption import Stopping
from aq_lightning.durable import manifest, partial_of, remove, sealed

_STATE = "state.ckpt"


class Fitted(Protocol):
    """A LightningModule that an :class:`Attempt` can fit."""

    place: str
    """What it is called in messages."""
    position: Position
    """Where it stands in the run."""
    after_step: Callable[[Fitted, int], None] | None
    """It calls this at the very end of every batch."""
    trainer: Trainer


@dataclass(frozen=True)
class Inside:
    """Where and when checkpoints are made.

    One is made every so many steps, when the process is told to stop, and at the end of every attempt at a window, so
    that an attempt which failed is not made again.
    """

    place: Path
    """A directory for them; ``0007.1.00000200`` is step 200 of the second attempt at the window of block 7."""
    every: int
    """Optimizer steps between two; 0: none but those at a stop and at an attempt's end."""
    stopping: Stopping
    """Whether the process is told to stop."""
    note: Callable[[dict[str, Any]], object]
    """Told where the work is, after every epoch."""

    def attempts(self, window: int, trainer: Callable[[], Trainer]) -> Callable[[], Attempt]:
        """Makes, call after call, the attempts at a window.

        Args:
            window: index of its first block.
            trainer: makes a fresh Trainer.
        """
        numbers = iter(range(10**6))
        return lambda: Attempt(self, f"{window:04d}.{next(numbers)}", trainer())


class Attempt(Checkpoint):
    """A Trainer's fit that goes on from its last checkpoint; of several processes the leading one writes it, for what
    it holds is the same in all.

    Args:
        inside: where checkpoints are.
        name: of the attempt.
        trainer: a fresh Trainer.
    """

    def __init__(self, inside: Inside, name: str, trainer: Trainer) -> None:
        self.inside, self.name, self.trainer = inside, name, trainer
        self.saved = 0
        self.batches: Pairs | None = None

    def fit(self, module: Fitted, batches: Pairs) -> None:
        """Trains, or goes on training.

        Raises:
            Interrupted: the process was told to stop; a checkpoint is made.
        """
        last = distributed.from_first(
            next((place for place in self._kept()[::-1] if manifest(place) is not None), None)
            if distributed.leads()
            else None
        )
        self.saved = 0 if last is None else int(last.suffix[1:])
        module.after_step, self.batches = self.after_step, batches
        self.trainer.callbacks.append(self)  # the last: it sees what the others did
        with self.inside.stopping.deferred():
            self.trainer.fit(module, batches, ckpt_path=None if last is None else last / _STATE, weights_only=True)
        module.after_step = None

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches.load_state_dict(state_dict)  # Lightning does not, where a schedule made it count the steps before

    def on_train_start(self, trainer: Trainer, pl_module: Fitted) -> None:
        self.inside.stopping.take_back()  # Lightning's own handler would end the fit without a checkpoint
        self._note(trainer, pl_module)

    def after_step(self, module: Fitted, batch_idx: int) -> None:
        """At the very end of a batch; what belongs to the end of an epoch must not be cut off by a checkpoint."""
        stepped = (batch_idx + 1) % module.trainer.accumulate_grad_batches == 0
        if stepped and not module.trainer.is_last_batch:
            self._save_if_due(module.trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Fitted) -> None:
        self._note(trainer, pl_module)
        self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Fitted) -> None:
        self._save(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        every, stopping = self.inside.every, self.inside.stopping
        told = distributed.anyone(stopping.requested is not None)
        if told or (every and trainer.global_step - self.saved >= every):
            self._save(trainer)
        if told:
            stopping.stop(f" behind step {trainer.global_step} of {trainer.lightning_module.place}")

    def _save(self, trainer: Trainer) -> None:
        target = self.inside.place / f"{self.name}.{trainer.global_step:08d}"
        before = distributed.from_first(self._kept())
        leads = distributed.leads()
        if target not in before:
            with sealed(target) if leads else nullcontext(partial_of(target)) as partial:
                trainer.save_checkpoint(partial / _STATE)
        for place in before:
            if leads and place != target:
                remove(place)
        distributed.wait()
        self.saved = trainer.global_step

    def _kept(self) -> list[Path]:
        return sorted(self.inside.place.glob(f"{self.name}.*[0-9]"))

    def _note(self, trainer: Trainer, module: Fitted) -> None:
        position = module.position
        self.inside.note(
            {
                "place": module.place,
                "windows": position.windows,
                "epoch": trainer.current_epoch,
                "epochs": trainer.max_epochs,
                "step": trainer.global_step,
                "loss": float(trainer.callback_metrics.get("loss", float("nan"))),
            }
        )
