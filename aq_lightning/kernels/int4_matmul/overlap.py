"""Starting before the kernel ahead has ended (programmatic dependent launch, since Hopper).

A kernel lets the next one start once all its own blocks run. That one asks for its weights to be brought into the cache
and waits; it reads and writes nothing until all that came before it has ended and can be seen. So memory is busy while
the last blocks of one kernel finish and the first of the next begin. Kernels without this, before or after, notice
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_AHEAD = tl.constexpr(8)  # tiles of columns that are asked for


@triton.jit
def start_early(words, i_span, last, spans, N, R: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Asks for the block's first tiles of columns, then waits for what came before.

    Args:
        words: int16.
        i_span, last: the block's first tile of columns, and the one behind its last.
        spans: tiles of columns in a row.
        N: rows.
        R: rows of the block.
        CHUNK: words in a row of a plane.
        TILE: words in a tile of 64 rows.
    """
    LINES: tl.constexpr = R * TILE // 64 // 64  # of 64 words, in one tile of columns
    o_line = tl.arange(0, triton.next_power_of_2(_AHEAD * LINES))
    o_span, o_word = i_span + o_line // LINES, o_line % LINES * 64
    i_row = tl.program_id(1) * R
    o_tile = i_row // 64 + o_word // TILE
    p_line = words + (o_tile.to(tl.int64) * spans + o_span) * TILE + i_row % 64 * CHUNK + o_word % TILE
    p_line = tl.where((o_span < last) & (o_tile < tl.cdiv(N, 64)), p_line, words)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_line], tl.int32, False, 1)
    gdc_wait()
    gdc_launch_dependents()
