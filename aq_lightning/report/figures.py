"""Plots as SVG that takes its colours from the page, and so is readable in light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aq_lightning.errors import RequestError
from aq_lightning.report.record import Epoch, Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[int, float]]
"""Name → block → value."""

_INK, _FAINT = "#010101", "#020202"  # stand-ins that :func:`_themed` replaces by the page's variables
_LINES = tuple(f"#03030{number}" for number in range(8))
_SHUT = "#8888883c"  # of entries that the mask never opened
_SIZE = (4.4, 2.7)  # inches; on a phone one figure takes the whole width
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "aq_lightning",  # the same run gives the same bytes
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def check_plots() -> None:
    """
    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RequestError(
            "A report is drawn with matplotlib, got none: pip install 'aq-lightning[report]'."
        ) from error


def over_depth(curves: Curves, label: str, log: bool = False) -> str:
    """A line with markers for each name, the block on the horizontal axis; SVG, empty if there is nothing to show."""
    known = {
        name: {b: v for b, v in sorted(values.items()) if v is not None and math.isfinite(v)}
        for name, values in curves.items()
    }
    known = {name: values for name, values in known.items() if values}
    if not known:
        return ""
    figure, axes = _figure()
    for (name, values), colour in zip(known.items(), _LINES * len(known), strict=False):
        axes.plot(list(values), list(values.values()), "o-", label=name, color=colour, markersize=2.2, linewidth=1.2)
    _finish(axes, "block", label, log and all(v > 0 for values in known.values() for v in values.values()))
    if len(known) > 1:
        _name(axes, min(3, len(known)))
    return _svg(figure)


def over_epochs(epochs: Sequence[Epoch]) -> str:
    """Each block's loss as a share of its first epoch's, the shallow blocks faint and the deep ones strong; SVG, empty
    if none was trained for more than one."""
    curves: dict[int, list[Epoch]] = {}
    for each in epochs:
        curves.setdefault(each.block, []).append(each)
    curves = {block: line for block, line in curves.items() if len(line) > 1 and line[0].loss > 0}
    if not curves:
        return ""
    figure, axes = _figure()
    for place, (block, line) in enumerate(curves.items()):
        strength = 0.25 + 0.75 * place / max(len(curves) - 1, 1)
        ends = place in (0, len(curves) - 1)
        axes.plot(
            [each.epoch for each in line], [each.loss / line[0].loss for each in line],
            color=_LINES[0], alpha=strength, linewidth=1.0, label=f"block {block}" if ends else None,
        )  # fmt: skip
    _finish(axes, "epoch", "loss / first epoch's", log=True)
    _name(axes, 2)
    return _svg(figure)


def heat_map(matrix: Matrix, part: int = 0) -> str:
    """One of a matrix's blocks: entries beside the diagonal by sign and size, relative to their row's diagonal; what
    the mask never opened is grey. SVG."""
    from matplotlib import rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = matrix.effective[part]  # (size, size)
    relative = values / values.diagonal().abs().clamp(min=1e-300)[:, None]
    relative.fill_diagonal_(0.0)
    limit = max(float(relative.abs().max()), 1e-12)
    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(False)
        shut = torch.where(matrix.mask == 0, 1.0, torch.nan)  # (size, size)
        axes.imshow(shut.numpy(), cmap=ListedColormap([_SHUT]), interpolation="nearest")
        shown = axes.imshow(
            relative.numpy(), cmap=_diverging(), vmin=-limit, vmax=limit, interpolation="nearest"
        )  # fmt: skip
        bar = figure.colorbar(shown, ax=axes, shrink=0.75, ticks=[-limit, 0, limit], format="%.1e")
        bar.outline.set_visible(False)
        axes.tick_params(length=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure)


def band(mask: Tensor) -> int:
    """Off-diagonals open on each side of a mask, (size, size)."""
    return int(mask[0].nonzero().max())


def _figure() -> tuple[Figure, Axes]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        return figure, figure.add_subplot()


def _finish(axes: Axes, across: str, up: str, log: bool) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator

    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # not in mathematical type, whose layout takes half of a report
        axes.yaxis.set_minor_formatter(LogFormatter())


def _name(axes: Axes, columns: int) -> None:
    """A legend above."""
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns,
        handlelength=1.4, fontsize=7, frameon=False, labelcolor=_INK,
    )  # fmt: skip


def _diverging() -> Colormap:
    """Blue through nothing to red: nothing is the page's own background."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = [(0.16, 0.44, 0.90, 1.0), (0.16, 0.44, 0.90, 0.0), (0.87, 0.28, 0.22, 0.0), (0.87, 0.28, 0.22, 1.0)]
    return LinearSegmentedColormap.from_list("signs", list(zip((0, 0.5, 0.5, 1), ends, strict=True)))


def _svg(figure: Figure) -> str:
    """Inline SVG whose size is left to the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    head = re.sub(r' (?:width|height|version|xmlns\S*)="[^"]*"', "", head)
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    names = {_INK: "--ink", _FAINT: "--faint"} | {line: f"--line-{number}" for number, line in enumerate(_LINES)}
    for colour, name in names.items():
        body = body.replace(colour, f"var({name})")
    return f"{head}>{body}"


def distinct(svg: str, number: int) -> str:
    """The same with names of its own, since a page holds many and each names its parts alike."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{number}-", svg)
