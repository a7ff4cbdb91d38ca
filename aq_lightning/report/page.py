"""The page: one file of HTML that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from aq_lightning.durable import write_text
from aq_lightning.report.figures import Curves, band, check_plots, distinct, heat_map, over_depth, over_epochs
from aq_lightning.report.record import Record
from aq_lightning.wording import divergences, duration

REPORT = "report.html"
"""Its name in a run directory."""
_STYLE = Path(__file__).with_name("style.css")
_ILL = 1e6  # condition number that deserves a word; float32 has seven digits
_DEPTHS = 3  # windows whose matrices are drawn


def write_report(path: Path) -> Path:
    """Writes ``RUN/report.html``.

    Raises:
        RequestError: no run is there, or matplotlib is not installed.
    """
    target = path / REPORT
    write_text(target, page([Record(path)]))
    return target


def page(records: Sequence[Record]) -> str:
    """HTML of one run, or of several side by side.

    Raises:
        RequestError: matplotlib is not installed.
    """
    check_plots()
    title = records[0].title if len(records) == 1 else f"{len(records)} runs"
    parts = [f"<h1>{escape(title)}</h1>", _table(_summary(records))]
    if len(records) > 1:
        parts += _comparison(records)
    for record in records:
        body = "\n".join(_sections(record))
        head = f"{record.name}: {record.title}"
        parts.append(body if len(records) == 1 else f"<details><summary>{escape(head)}</summary>{body}</details>")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>",
            f"<body><main>{_numbered(parts)}</main></body></html>\n",
        ]
    )


def _numbered(parts: Iterable[str]) -> str:
    """The parts in order; each figure's names are its own."""
    pieces = "\n".join(parts).split("<svg")
    return pieces[0] + "".join(distinct(f"<svg{piece}", number) for number, piece in enumerate(pieces[1:]))


def _summary(records: Sequence[Record]) -> Iterator[list[str]]:
    """Head and a row for each run, after those of the models that it is compared to."""
    yield ["run", "model", "perplexity", "bits per weight", "size", "calibration", "peak memory"]
    seen: list[list[str]] = []
    for record in records:
        for row in record.rows[:-1]:
            cells = [str(row["model"]), _figure(row["perplexity"]), f"{row['bits']:.3f}", "", "", ""]
            if cells not in seen:  # runs of one model on one text share these
                seen.append(cells)
                yield ["", *cells]
        last: Mapping[str, Any] = record.rows[-1] if record.rows else {"model": "not finished", "perplexity": None}
        bits = "" if record.bits is None else f"{record.bits:.3f}"
        size = "" if record.size is None else f"{record.size / 1e6:,.1f} MB"
        own = [str(last["model"]), _figure(last["perplexity"]), bits, size]
        yield [record.name, *own, duration(record.seconds), f"{record.memory / 1e9:.2f} GB"]


def _comparison(records: Sequence[Record]) -> Iterator[str]:
    """Several runs in one plot each."""
    names = _unique([record.name for record in records])
    ends = {name: _depth(record, "loss") for name, record in zip(names, records, strict=True)}
    nearest = {name: _depth(record, "rtn_loss") for name, record in zip(names, records, strict=True)}
    shares = {
        name: {block: loss / nearest[name][block] for block, loss in values.items() if nearest[name].get(block)}
        for name, values in ends.items()
    }
    yield "<h2>All runs</h2>"
    yield _gallery(
        {
            "Loss of each block as it was left": over_depth(ends, "loss", log=True),
            "The same as a share of round-to-nearest's": over_depth(shares, "loss / round-to-nearest's", log=True),
        }
    )


def _sections(record: Record) -> Iterator[str]:
    """Everything about one run."""
    losses = {
        "round to nearest": _depth(record, "rtn_loss"),
        "before training": _depth(record, "initial_loss"),
        "as left": _depth(record, "loss"),
    }
    yield "<h2>Loss</h2>"
    yield _gallery(
        {
            "Of each block": over_depth(losses, "loss", log=True),
            "Of each epoch, faint to strong from the first block to the last": over_epochs(record.epochs),
        }
    )
    if record.tuning:
        yield "<h2>Scales of all blocks</h2>"
        spent = duration(record.tuning["seconds"])
        yield f"<p>Mean divergence from the full-precision model: {divergences(record.tuning)}, in {spent}.</p>"
    yield "<h2>What went otherwise</h2>"
    yield _list(_incidents(record)) or "<p>Nothing: every block was left as trained, no attempt was stopped.</p>"
    yield "<h2>Invertibility</h2>"
    yield _gallery(
        {
            "Condition number of each site's transform": over_depth(_by_site(record, "condition"), "condition", True),
            "Dominance margin of affine matrices: 1 diagonal, 0 no guarantee": over_depth(
                _by_site(record, "margin"), "margin"
            ),
        }
    )
    yield from _matrices(record)
    yield "<h2>Ranges</h2>"
    yield _gallery(_ranges(record))
    yield "<h2>What folds, and what stays at run time</h2>"
    yield _table(_places(record)) if record.results.get("sites") else "<p>Known when the run is finished.</p>"


def _incidents(record: Record) -> Iterator[str]:
    """Fall-backs, stopped attempts, and what was said before the run."""
    for window in record.windows:
        if window["attempts"] and window["outcome"] != "trained":
            yield f"block {window['block']}: training did not help, left as: {window['outcome']}"
        for cause in window["causes"]:
            value = "not finite" if cause["value"] is None else f"{cause['value']:.2e}"
            site = f", {cause['site']}" if cause["site"] else ""
            yield f"block {cause['block']}{site}: {cause['what']} {value} in epoch {cause['epoch']}; tried again"
        for site, condition in window["condition"].items():
            if not condition <= _ILL:
                yield f"block {window['block']}, {site}: left with condition number {condition:.1e}"
    if record.tuning and record.tuning["outcome"] != "trained":
        yield "scales of all blocks: training did not help, left as they were"
    yield from map(str, record.results.get("notes", ()))


def _matrices(record: Record) -> Iterator[str]:
    """Heat maps of some depths."""
    drawn = record.matrices(_DEPTHS)
    if not drawn:
        return
    yield "<h2>Learnt matrices</h2>"
    yield (
        "<p>Entries beside the diagonal, relative to their row's diagonal: blue below 0, red above, grey where the "
        "mask never opened. The first head of each.</p>"
    )
    yield _gallery(
        {
            f"Block {matrix.block}, {matrix.site}: {band(matrix.mask)} of {matrix.mask.shape[0] - 1} "
            "off-diagonals open on each side": heat_map(matrix)
            for matrix in drawn
        }
    )


def _ranges(record: Record) -> dict[str, str]:
    """Activations and weights before and after, by site and weight."""
    figures = {}
    for what in ("activations", "weights"):
        names = sorted({name for window in record.windows for name in _reach(window, f"{what} before")})
        for name in names:
            for number, label in (("greatest", "greatest magnitude"), ("spread", "greatest / median channel")):
                curves = {
                    when: {
                        window["block"]: _reach(window, f"{what} {when}").get(name, {}).get(number)
                        for window in record.windows
                    }
                    for when in ("before", "after")
                }
                figures[f"{what.capitalize()}: {name}, {label}"] = over_depth(curves, label, log=True)
    return figures


def _reach(window: dict, what: str) -> dict:
    return window.get("reach", {}).get(what, {})


def _places(record: Record) -> Iterator[list[str]]:
    yield ["site", "producer → readers", "folds", "at run time"]
    for site in record.results["sites"]:
        yield [site["name"], site["ends"], ", ".join(site["folds"]) or "–", ", ".join(site["online"]) or "–"]


def _depth(record: Record, name: str) -> dict[int, float]:
    return {window["block"]: window[name] for window in record.windows if name in window}


def _by_site(record: Record, name: str) -> Curves:
    sites = sorted({site for window in record.windows for site in window.get(name, {})})
    return {
        site: {window["block"]: window[name][site] for window in record.windows if site in window.get(name, {})}
        for site in sites
    }


def _unique(names: Sequence[str]) -> list[str]:
    """The same, numbered where one stands twice."""
    return [name if names.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(names)]


def _gallery(figures: dict[str, str]) -> str:
    """Figures with their captions; a sentence if there are none."""
    drawn = [f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in figures.items() if svg]
    return f'<div class="gallery">{"".join(drawn)}</div>' if drawn else "<p>Nothing was recorded.</p>"


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def _figure(perplexity: float | None) -> str:
    if perplexity is None or not math.isfinite(perplexity):
        return "–"
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.2e}"
