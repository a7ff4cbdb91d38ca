"""Text that a language model writes itself, to be tuned on beside text that was given."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from aq_lightning.models.pretrained import Pretrained

_BEGINNING = 16  # tokens of a window that a text goes on from
_TEXT = 512  # tokens of a text, at most; a window holds several


def beginnings(windows: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Where texts begin: pieces of windows, each window in turn, from anywhere inside of it.

    Args:
        windows: tokens, int64 (samples, length).
        count: of texts.
        size: tokens of a piece.
        generator: of the places.

    Returns:
        int64 (count, size).
    """
    places = torch.randint(windows.shape[1] - size + 1, (count,), generator=generator)
    return torch.stack([windows[text % len(windows), at : at + size] for text, at in enumerate(places.tolist())])


@torch.no_grad()
def written_windows(
    pretrained: Pretrained, windows: Tensor, count: int, batch_size: int, seed: int, device: torch.device
) -> Tensor:
    """Windows of text drawn token by token from the full-precision model, at temperature 1.

    Data that a model generates itself, in the place of data from outside, is LLM-QAT's (arXiv 2305.17888).

    Args:
        pretrained: the model; for a while all of it is on the device, in the dtype in which it is stored.
        windows: tokens to begin from, int64 (samples, length).
        count: of windows to write.
        batch_size: texts at once; half as many where memory runs out.
        seed: of where they begin and what is drawn.
        device: where to work.

    Returns:
        int64 (count, length), on the CPU.
    """
    length = windows.shape[1]
    each = min(_TEXT, length)
    per_window = -(-length // each)
    size = min(_BEGINNING, each // 2)
    starts = beginnings(windows, count * per_window, size, torch.Generator().manual_seed(seed))
    model = _whole(pretrained, device)
    plan = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=each - size,
        max_new_tokens=each - size,
        pad_token_id=0,
    )  # without an end: one that is drawn is a token like any other
    texts: list[Tensor] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while (done := sum(map(len, texts))) < len(starts):
            part, text = starts[done : done + batch_size].to(device), None
            with suppress(*(torch.OutOfMemoryError,) if batch_size > 1 else ()):
                text = model.generate(part, attention_mask=torch.ones_like(part), generation_config=plan).cpu()
            if text is None:
                batch_size = (batch_size + 1) // 2
            else:
                texts.append(text)
    return torch.cat(texts).view(count, per_window * each)[:, :length].contiguous()


def _whole(pretrained: Pretrained, device: torch.device) -> PreTrainedModel:
    """The full-precision model as it is stored, with all its blocks, which are read one at a time, on a device."""
    model = pretrained.shell().to(device)
    blocks = model.get_submodule(pretrained.architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for index in range(len(blocks)):
        blocks[index] = pretrained.block(index).to(device)
    return model.eval()
