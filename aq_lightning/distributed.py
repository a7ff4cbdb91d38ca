"""What several processes with a share of the samples each tell one another; alone, everything here does nothing.

Numbers are added up over Lightning's process group. Decisions travel over a second group, on the hosts, which waits for
as long as it takes: one process scores or writes while the others have nothing to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")

_PATIENCE = timedelta(days=30)
_LARGE = 2**22  # elements of a tensor that is added up without being copied beside others
_hosts: list[dist.ProcessGroup] = []  # one group, while the processes are connected
_rank: list[int] = []  # one number, once they were


def connect() -> None:
    """Opens the second group; Lightning has made the first."""
    _hosts.append(dist.new_group(backend="gloo", timeout=_PATIENCE))
    _rank.append(dist.get_rank())


def part() -> None:
    """Ends both groups: from here every process is alone, and only the leading one has anything to do."""
    if _hosts:
        wait()
        _hosts.clear()
        dist.destroy_process_group()


def ranks() -> int:
    """Processes that are connected."""
    return dist.get_world_size() if _hosts else 1


def rank() -> int:
    """Number of this process."""
    return _rank[0] if _rank else 0


def leads() -> bool:
    """Whether this is the process that writes, scores and speaks."""
    return rank() == 0


def gathered(value: Value) -> list[Value]:
    """Every process's value, by rank."""
    if ranks() == 1:
        return [value]
    values: list = [None] * ranks()
    dist.all_gather_object(values, value, group=_hosts[0])
    return values


def from_first(value: Value) -> Value:
    """What the leading process has; the others wait for it."""
    if ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_hosts[0], device=torch.device("cpu"))
    return values[0]


def wait() -> None:
    """Until every process is here."""
    if ranks() > 1:
        dist.barrier(group=_hosts[0])


def anyone(value: bool) -> bool:
    """Whether it is true of any process."""
    if ranks() == 1:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=_hosts[0])
    return bool(flag)


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor, in place, by its sum over all processes, the same bits everywhere."""
    if ranks() == 1:
        return
    small: dict[tuple, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() < _LARGE or not tensor.is_contiguous():
            small[tensor.dtype, tensor.device].append(tensor)
        else:
            _all_reduce(tensor, dist.ReduceOp.SUM)
    for each in small.values():
        joined = torch.cat([tensor.reshape(-1) for tensor in each])
        _all_reduce(joined, dist.ReduceOp.SUM)
        parts = joined.split([tensor.numel() for tensor in each])
        torch._foreach_copy_(each, [part.view_as(tensor) for part, tensor in zip(parts, each, strict=True)])


def mean(values: Tensor) -> Tensor:
    """Of (values of one process) over those of all, of which each may have another number; a scalar."""
    if ranks() == 1:
        return values.mean()
    both = torch.stack([values.sum(dtype=torch.float64), values.new_tensor(len(values), dtype=torch.float64)])
    add_up([both])
    return both[0] / both[1]


def least(tensor: Tensor) -> Tensor:
    """The least over all processes, element by element."""
    return _extreme(tensor, dist.ReduceOp.MIN)


def greatest(tensor: Tensor) -> Tensor:
    """The greatest over all processes, element by element."""
    return _extreme(tensor, dist.ReduceOp.MAX)


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Gives every process the parameters and buffers of the leading one."""
    if ranks() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0, group=_group(tensor))


def _extreme(tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
    if ranks() == 1:
        return tensor
    result = tensor.clone()
    _all_reduce(result, operation)
    return result


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp) -> None:
    dist.all_reduce(tensor, operation, group=_group(tensor))


def _group(tensor: Tensor) -> dist.ProcessGroup | None:
    """Of the device that holds a tensor; None: Lightning's."""
    return _hosts[0] if tensor.device.type == "cpu" else None
