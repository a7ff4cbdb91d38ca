"""Formulas become MathML when the site is built, so that pages need no script; roles of docstrings become code."""

import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|exc):<code>~?([^<]*)</code>")
_ROLE_MATH = re.compile(r":math:<code>([^<]*)</code>")
_DIRECTIVE = re.compile(r"<p>\.\. math:: (.*?)</p>", re.DOTALL)


def on_page_content(html, **_):
    """Called by mkdocs with each page."""
    for pattern, display in ((_INLINE, "inline"), (_ROLE_MATH, "inline"), (_BLOCK, "block"), (_DIRECTIVE, "block")):
        html = pattern.sub(lambda found, display=display: _mathml(found.group(1), display), html)
    return _ROLE.sub(r"<code>\1</code>", html)


def _mathml(formula, display):
    plain = formula.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()
    written = convert(plain, display=display)
    if "\\" in written:  # a command that the converter does not know, left as it is
        raise ValueError(f"A formula uses what latex2mathml knows, got {plain!r}: {written}")
    return written
