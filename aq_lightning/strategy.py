"""Lightning's data parallelism, as calibration uses it."""

from __future__ import annotations

import os
import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from aq_lightning import distributed
from aq_lightning.errors import RequestError

_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")  # others would cast the transforms


class Replicas(DDPStrategy):
    """DDP in all that starts, places and connects processes, without its wrapper around the module.

    The few trained parameters need one sum a step, which :class:`aq_lightning.calibration.microbatch.MicroBatched`
    takes behind the backward pass, recorded or not, in however many parts memory makes a process cut it. To Lightning's
    loops each process trains alone: otherwise they would wait for the device in every step, to ask who is to stop.
    """

    @property
    def world_size(self) -> int:
        return 1

    @property
    def ranks(self) -> int:
        """Processes of all nodes."""
        return self.num_nodes * self.num_processes

    def configure_ddp(self) -> None:
        """Leaves the module as it is."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = distributed.gathered(bool(decision))
        return min(votes) if all else max(votes)


def replicas(strategy: Strategy, subcommand: str) -> Replicas | None:
    """What stands for the strategy of a Trainer with several processes; None for one process.

    Raises:
        RequestError: it is not DDP with processes that run the command themselves, or the command is not ``fit``.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return None
    if subcommand != "fit":
        raise RequestError(f"Only fit runs on several devices, got {strategy.world_size}: set --trainer.devices 1.")
    if type(strategy) is not DDPStrategy or not isinstance(strategy.launcher, _SubprocessScriptLauncher):
        raise RequestError(
            f"Several processes share the samples by DDP, got {type(strategy).__name__} with "
            f"{type(strategy.launcher).__name__}: set --trainer.strategy ddp."
        )
    return Replicas(process_group_backend=strategy.process_group_backend)


def wished(devices: int | str | list[int], nodes: int) -> int:
    """Processes of a run with such options of a Trainer, whatever this machine has."""
    if isinstance(devices, list):
        return nodes * len(devices)
    if isinstance(devices, str) and "," in devices:
        return nodes * len([each for each in devices.split(",") if each.strip()])
    count = -1 if devices == "auto" else int(devices)
    return nodes * (count if count > 0 else max(torch.cuda.device_count(), 1))


def check_start(strategy: Strategy, called: bool) -> tuple[int, int]:
    """Processes that a Trainer's strategy stands for, and the number of this one.

    Args:
        strategy: a Trainer's.
        called: whether a program gave the arguments, which a process that runs the same command would not see.

    Raises:
        RequestError: Lightning would have to start processes all the same.
    """
    ranks, rank = (strategy.ranks, strategy.global_rank) if isinstance(strategy, Replicas) else (1, 0)
    if ranks > 1 and called and not strategy.cluster_environment.creates_processes_externally:
        raise RequestError(
            f"Several processes run one command line, got {ranks} from a call in Python: run `python train.py fit` or "
            "torchrun, or set --trainer.devices 1."
        )
    return ranks, rank


def check_steps(ranks: int, samples: int, batch_size: int, accumulated: int) -> None:
    """
    Raises:
        RequestError: a process would have no part in a step, or steps add up batches.
    """
    if ranks > min(samples, batch_size):
        raise RequestError(
            f"Every process has a part in every step, got {ranks} processes for {samples} samples in batches of "
            f"{batch_size}: set --model.batch_size to a multiple of {ranks}, or start fewer."
        )
    if ranks > 1 and accumulated > 1:
        raise RequestError(
            f"Several processes add up gradients once a step, got --trainer.accumulate_grad_batches {accumulated}: "
            "leave it at 1, and raise --model.batch_size."
        )


def check_shares(ranks: int, batch_size: int, tuned: int) -> None:
    """
    Raises:
        RequestError: the windows of text of a process would be others when scales are tuned than they were before.
    """
    if batch_size % ranks or tuned % ranks:
        raise RequestError(
            f"Several processes tune scales with the windows that they have, got {ranks} processes for batches of "
            f"{batch_size} and {tuned}: set --model.batch_size and --model.tuning.batch_size to multiples of {ranks}, "
            "or add --model.tuning null."
        )


def alone(strategy: Strategy) -> dict[str, object]:
    """Options of a Trainer that leaves this process on its device without the others."""
    if not isinstance(strategy, Replicas):
        return {}
    device = strategy.root_device
    return {"devices": [device.index] if device.type == "cuda" else 1, "num_nodes": 1, "strategy": "auto"}


def check_trainer(trainer: Trainer) -> None:
    """
    Raises:
        RequestError: its device or precision has no room for transforms in float64.
    """
    if trainer.strategy.root_device.type not in ("cpu", "cuda"):
        raise RequestError(
            f"Transforms need a device with float64, got {trainer.strategy.root_device}: set --trainer.accelerator cpu."
        )
    if trainer.precision not in _PRECISIONS:
        raise RequestError(
            f"Blocks are trained in {', '.join(_PRECISIONS)} (transforms stay in float64), "
            f"got {trainer.precision}: set --trainer.precision to one of them."
        )


def begin(strategy: Strategy) -> None:
    """Starts and connects the processes of a run, once; every later Trainer with such a strategy finds them.

    Args:
        strategy: a Trainer's; nothing is done unless it is :class:`Replicas`.
    """
    if isinstance(strategy, Replicas):
        strategy.launcher.launch(strategy.setup_environment)
        distributed.connect()
        if not distributed.leads():
            sys.stdout = open(os.devnull, "w")  # for the rest of the process
