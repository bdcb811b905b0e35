"""The CUDA kernel: a mechanism's formula through FlexAttention (torch.nn.attention.flex_attention).

The formula becomes score_mod(s, b, h, i, j) = s + bias(h, i, j) and mask_mod = bias > -inf. For a relative mechanism
with parameters the bias is first tabulated by offset, so that gradients accumulate in one tensor. The block mask is
built on the device, without a T x T mask and without synchronising.

Letters: B batch, T time, H heads, K key heads, D head size; n = T / BLOCK blocks of queries, and as many of keys.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as torch_flex

from core import blocks, sinks
from core.config import UserError
from core.ops import matrix_variation
from core.texts import NO_TEXTS

BLOCK = 128  # queries and keys per block of the mask: FlexAttention's default
FACTOR_FLOOR = 1e-30  # a factor of 0 would give a score of -inf, and a row of such scores has no gradient


def attend(layer, q, k, v, texts=NO_TEXTS, dropout=0.0):
    """Attention by `layer`'s bias, equal to `layer.weights(q, k) @ v` except for dropout's random stream: (B, H, T, D).

    q: (B, H, T, D). k, v: (B, K, T, D). texts: a `texts.Texts`. A `factor` takes two more passes without gradient, for
    each row's sum of exponentials and of their squares. FlexAttention has no dropout: the output of a pass that drops
    pairs is scaled by the ratio of its sums to those of all pairs.
    """
    score, mask = score_and_mask(layer, q.size(2), texts)
    call = functools.partial(run, q, k, v, block_mask=block_mask(layer, q.size(2), mask, q.device, texts))
    if layer.reweighs or dropout:
        y, total = reweighed(layer, score, call, texts, dropout, q)
    else:
        y, total = call(score)
    lse = total[..., None] if sinks.needs_lse(layer, q.size(2)) else None
    return sinks.complete(layer, y, lse, q, k, v, texts, dropout)


def reweighed(layer, score, call, texts, dropout, q):
    """`run` with the layer's factor and dropout: (outputs (B, H, T, D), log-sum-exp of the scores (B, H, T))."""
    plain = total = call(score)[1]
    scaled = score
    if layer.reweighs:
        scaled = with_factor(layer, score, total.detach(), call, texts)
        if layer.renormalize:
            total = call(scaled)[1] if dropout else None
    if dropout:
        scaled = with_dropout(scaled, dropout, q.device)
    y, scaled_total = call(scaled)
    if total is None:
        return y, plain
    share = torch.exp(scaled_total - total).nan_to_num(0.0)[..., None]  # NaN where a row keeps no key
    return (y * share / (1 - dropout)).to(q.dtype), plain


def run(q, k, v, score_mod, block_mask):
    """(outputs (B, H, T, D), log-sum-exp of each row (B, H, T)) of FlexAttention.

    Raises UserError at PyTorch's limit of compiled variants: uncompiled, FlexAttention would need T x T scores.
    """
    try:
        y, aux = kernel(q.device.type)(q, k, v, score_mod=score_mod, block_mask=block_mask,
                                       enable_gqa=k.size(1) < q.size(1), return_aux=torch_flex.AuxRequest(lse=True))
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        limit = torch._dynamo.config.recompile_limit
        raise UserError("kernel=flex: FlexAttention was compiled for more shapes than "
                        f"torch._dynamo.config.recompile_limit ({limit}) allows; raise it, keep to one text length, or "
                        "use kernel=engine") from error
    return y, aux.lse


def kernel(device):
    """FlexAttention for a kind of device: compiled on CUDA; uncompiled elsewhere, with T x T scores, for tests."""
    return compiled() if device == "cuda" else torch_flex.flex_attention


@functools.cache
def compiled():
    """FlexAttention through torch.compile. fullgraph makes it raise at the limit of recompilations: see `run`."""
    return torch.compile(torch_flex.flex_attention, fullgraph=True, dynamic=False)


def score_and_mask(layer, T, texts):
    """(score_mod, mask_mod) of a layer for texts of T tokens (a `texts.Texts`).

    A mask_mod may not depend on parameters. If the bias does and is not relative, only score_mod drops pairs.
    """
    bias = kept_bias = layer.total_bias
    lengths, documents, decay, _ = texts
    if layer.mask_parameters():
        kept_bias = None
        if layer.relative:
            table = layer.bias_by_offset(T).expand(layer.n_head, -1)
            bias, kept_bias = by_offset(table, T), by_offset(table.detach(), T)

    def score(s, b, h, i, j):
        s = s + bias(h, i, j)
        if decay is not None:
            between = decay[b, h, i] - decay[b, h, j]
            s = s + (between if layer.causal else -between.abs())
        return s

    def mask(b, h, i, j):
        kept = kept_bias(h, i, j) > -math.inf if kept_bias else j >= 0
        if lengths is not None:
            kept = kept & (j < lengths[b])
        if documents is not None:  # see `Texts.restrict`
            kept = kept & (j >= documents[b, i]) & (i >= documents[b, j])
        return kept

    return score, mask


def by_offset(table, T):
    """bias(h, i, j) read from a table (H, 2 T - 1) by offset."""
    return lambda h, i, j: table[h, j - i + (T - 1)]


# ---- factors and dropout -------------------------------------------------------------------


def with_factor(layer, score, total, call, texts):
    """`score` plus the log of the layer's detached factor. total: (B, H, T), the log-sum-exp of each row of scores."""
    with torch.no_grad():
        squares = torch.exp(call(lambda s, b, h, i, j: 2 * score(s, b, h, i, j))[1] - 2 * total).nan_to_num(0.0)
        keys = torch.exp(call(lambda s, b, h, i, j: torch.zeros_like(s))[1]).round().clamp(min=1)
        variation = squares * keys - 1
        if layer.scope == "matrix":
            variation = matrix_variation(squares[..., None], texts)[..., 0].expand_as(keys)

    def scaled(s, b, h, i, j):
        s = score(s, b, h, i, j)
        p = torch.exp(s.detach() - total[b, h, i])
        return s + torch.log(layer.factor(p, keys[b, h, i], variation[b, h, i]).clamp(min=FACTOR_FLOOR))

    return scaled


def with_dropout(score, dropout, device):
    """`score` with pairs dropped at a rate by a hash of a seed and the pair, which is equal in forward and backward."""
    seed = torch.randint(2**31, (), device=device)
    # a tensor, since dynamo would make a number symbolic, which FlexAttention refuses
    limit = torch.full((), int(dropout * 2**24), device=device)

    def scaled(s, b, h, i, j):
        x = seed
        for index in (b, h, i, j):  # mixed after each, so that heads and texts do not share bits at shifted positions
            x = (x + index) & 0x7FFFFFFF
            for factor in (0x45D9F3B, 0x2C1B3C6D):
                x = ((x ^ (x >> 16)) * factor) & 0x7FFFFFFF
        return torch.where((x >> 7) < limit, -math.inf, score(s, b, h, i, j))

    return scaled


# ---- the block mask ------------------------------------------------------------------------


def block_mask(layer, T, mask, device, texts=NO_TEXTS):
    """The BlockMask of a layer for T tokens: all blocks that contain a kept pair, filtered by `mask` (a mask_mod)."""
    cells = cells_of(layer, T, device)[None]  # (1, H or 1, n, n)
    if texts.limits_keys:
        cells = cells & cells_of_texts(texts, layer.causal)
    order = torch.argsort(cells.to(torch.int8), dim=-1, descending=True, stable=True)
    counts = cells.sum(-1, dtype=torch.int32)
    return torch_flex.BlockMask.from_kv_blocks(counts, order.to(torch.int32), BLOCK_SIZE=BLOCK, mask_mod=mask,
                                               seq_lengths=(T, T))


def cells_of_texts(texts, causal):
    """Which blocks of BLOCK x BLOCK may contain a pair within `Texts.key_limits`: bool (B, H or 1, n, n)."""
    first, last = texts.key_limits(causal)
    T = first.size(2)
    first = F.pad(first, (0, -T % BLOCK), value=T).unflatten(2, (-1, BLOCK)).amin(3)  # of a block of queries
    last = F.pad(last, (0, -T % BLOCK)).unflatten(2, (-1, BLOCK)).amax(3)
    start = torch.arange(0, T, BLOCK, device=first.device)
    return (start < last[..., None]) & (start + BLOCK > first[..., None])


@torch.no_grad()
def cells_of(layer, T, device):
    """Which blocks of BLOCK x BLOCK contain a pair that the layer may keep: bool (H or 1, n, n) on the device."""
    n = -(-T // BLOCK)
    if layer.relative:
        kept = layer.bias_by_offset(T) > -math.inf  # offsets 1 - T to T - 1
        kept = F.pad(kept, (n * BLOCK - T, n * BLOCK - T + 1)).float()  # offsets -n BLOCK + 1 to n BLOCK
        band = F.max_pool1d(kept, 2 * BLOCK - 1, BLOCK) > 0  # (H or 1, 2 n - 1): block offsets 1 - n to n - 1
        index = torch.arange(n, device=device)
        return band[:, index - index[:, None] + n - 1]
    key = T, "cells", str(device)
    if key not in layer.blocks_of:
        cells = torch.zeros(layer.n_head, n, n, dtype=torch.bool)
        for block in (block for part in blocks.find(layer, T) for block in part):
            rows = sorted({i // BLOCK for i in block.queries})
            columns = sorted({j // BLOCK for keys in block.kv_ranges for j in keys})
            cells[block.heads.start : block.heads.stop, torch.tensor(rows)[:, None], torch.tensor(columns)] = True
        if layer.causal:
            cells = cells.tril()
        layer.blocks_of[key] = cells.to(device)
    return layer.blocks_of[key]
