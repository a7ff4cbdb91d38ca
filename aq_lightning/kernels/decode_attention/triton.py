"""Attention of one token on a GPU: programs take spans of the tokens before it, and the last of them joins the answers.

A span's answer is kept with the greatest score in it and the sum of its exponentials, by which spans are joined, always
in the same order (flash-decoding, Dao et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aq_lightning.kernels.workspace import Workspace, last_of

_BLOCK = 64  # tokens that a program reads at a time
_STAGES = 2  # of reading: most programs have one or two blocks
_LEAST = 16  # rows of a product on tensor cores
_PROGRAMS = 2  # for each multiprocessor, at most
_SPANS = 32  # of a head at most: its last program has the answers of all in registers
_MULTIPROCESSORS = 132  # where there is no GPU


@triton.jit
def _decode_attention_kernel(
    query, key, value, mask, y, partial, counter,
    scale, heads, length, span, splits, q_b, q_h, k_b, k_h, k_l, v_b, v_h, v_l, m_b,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HIDES: tl.constexpr, ADDS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """GROUP query heads, padded to ROWS, of one key-value head, over ``span`` tokens, BLOCK at a time; SPLITS spans at
    most."""
    i_s, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_g, o_d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    m_g, m_d = o_g < GROUP, o_d < SIZE
    m_q = m_g[:, None] & m_d[None, :]
    b_q = tl.load(query + i_b * q_b + (i_h * GROUP + o_g)[:, None] * q_h + o_d[None, :], mask=m_q, other=0.0)
    p_k, p_v = key + i_b * k_b + i_h * k_h + o_d[None, :], value + i_b * v_b + i_h * v_h + o_d[None, :]
    b_top = tl.full([ROWS], float("-inf"), tl.float32)  # greatest score
    b_sum, b_y = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(i_s * span, tl.minimum((i_s + 1) * span, length), BLOCK):
        o_l = start + tl.arange(0, BLOCK)
        m_l = o_l < length
        if HIDES:
            m_l = m_l & (tl.load(mask + i_b * m_b + o_l, mask=m_l, other=0) != 0)
        m_kv = m_l[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_l.to(tl.int64)[:, None] * k_l, mask=m_kv, other=0.0)  # [BLOCK, PADDED]
        b_v = tl.load(p_v + o_l.to(tl.int64)[:, None] * v_l, mask=m_kv, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k)) * scale  # [ROWS, BLOCK]
        if ADDS:
            b_s += tl.load(mask + i_b * m_b + o_l, mask=m_l, other=0.0).to(tl.float32)[None, :]
        b_s = tl.where(m_l[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_at = tl.where(b_new == float("-inf"), 0.0, b_new)  # so that nothing seen is no NaN
        b_p, b_less = tl.exp(b_s - b_at[:, None]), tl.exp(b_top - b_at)
        b_sum = b_sum * b_less + tl.sum(b_p, 1)
        b_y = tl.dot(b_p.to(b_v.dtype), b_v, b_y * b_less[:, None])
        b_top = b_new
    o_y = (i_bh * GROUP + o_g)[:, None] * SIZE + o_d[None, :]
    if SPLITS == 1:
        b_y *= tl.div_rn(1.0, tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
        tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_q)
    else:
        p_rows = partial + i_bh.to(tl.int64) * (splits * GROUP * (PADDED + 4))
        p_mine = p_rows + (i_s * GROUP + o_g) * (PADDED + 4)
        tl.store(p_mine[:, None] + o_d[None, :], b_y, mask=m_g[:, None])
        tl.store(p_mine + PADDED, b_top, mask=m_g)
        tl.store(p_mine + PADDED + 1, b_sum, mask=m_g)
        if last_of(counter + i_bh, splits):
            o_s = tl.arange(0, SPLITS)
            m_s = o_s < splits
            for g in tl.static_range(GROUP):  # all spans of a query head at once: nothing waits for another load
                p_all = p_rows + (o_s * GROUP + g) * (PADDED + 4)
                b_tops = tl.load(p_all + PADDED, mask=m_s, other=float("-inf"), cache_modifier=".cg")
                b_sums = tl.load(p_all + PADDED + 1, mask=m_s, other=0.0, cache_modifier=".cg")
                b_ys = tl.load(p_all[:, None] + o_d[None, :], mask=m_s[:, None], other=0.0, cache_modifier=".cg")
                b_at = tl.max(b_tops, 0)
                b_more = tl.exp(b_tops - tl.where(b_at == float("-inf"), 0.0, b_at))
                b_all = tl.sum(b_sums * b_more, 0)
                b_all = tl.sum(b_ys * b_more[:, None], 0) * tl.div_rn(1.0, tl.where(b_all == 0.0, 1.0, b_all))
                tl.store(y + (i_bh * GROUP + g) * SIZE + o_d, b_all.to(y.dtype.element_ty), mask=m_d)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As :func:`naive.decode_attention`, for operands that :func:`..suits` accepts."""
    batch, heads, length, size = key.shape
    group = query.shape[1] // heads
    rows, padded = max(_LEAST, triton.next_power_of_2(group)), max(_LEAST, triton.next_power_of_2(size))
    blocks = triton.cdiv(length, _BLOCK)
    programs = min(blocks, _SPANS, _PROGRAMS * _multiprocessors(key.device) // (batch * heads))
    share = triton.cdiv(blocks, max(1, programs))
    splits = triton.cdiv(blocks, share)
    y = query.new_empty(batch, 1, heads * group, size)
    mask = mask.contiguous() if mask is not None and mask.stride(-1) != 1 else mask
    workspace = Workspace((batch, heads, splits), group * (padded + 4))
    _decode_attention_kernel[splits, batch * heads](
        query, key, value, mask, y, *workspace.take(key.device),
        scale, heads, length, share * _BLOCK, splits, *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        GROUP=group, ROWS=rows, SIZE=size, PADDED=padded, BLOCK=_BLOCK, SPLITS=triton.next_power_of_2(splits),
        HIDES=mask is not None and mask.dtype == torch.bool, ADDS=mask is not None and mask.dtype != torch.bool,
        num_stages=_STAGES,
    )  # fmt: skip
    return y


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
