"""Fast reweighing of softmax weights by rank: the factors of atrt.py, in few passes over the weights.

Letters: n rows of m keys.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from core.ops import accumulate_dtype

PIECE = 2**19  # elements processed at once on a CPU: their float32 copies fit the cache, and few operations are started


class Zones(NamedTuple):
    """Where a weight's rank s = (p - mu) / sigma gives which factor: see `atrt.Attention.factor`."""

    borders: list  # [low, high]
    factors: list  # [edge, middle, border, top]
    sharpness: float
    width: float  # standard deviation of the moderate zone's Gaussian, as a share of the zone


def reweigh(p, keys, variation, zones, renormalize):
    """p f / sum(p f), or p f without `renormalize`, as `attention.Attention.reweigh` computes it.

    p: (..., m); keys: (..., 1); variation: (..., 1), or None: computed per row. Factors f are detached.
    """
    if not (torch.is_grad_enabled() and p.requires_grad):
        return in_pieces(p, keys, variation, zones, renormalize)
    y = p * in_pieces(p.detach(), keys, variation, zones, renormalize, only_factors=True)
    return y / y.sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny) if renormalize else y


def in_pieces(p, keys, variation, zones, renormalize, only_factors=False):
    """`reweigh` of p, or the factors alone, computed in float32 for some rows at a time."""
    wide = accumulate_dtype(p)
    out, rows, m = p.new_empty(p.shape), p.reshape(-1, p.size(-1)), p.size(-1)
    keys = keys.clamp(min=1)  # 0 in a row of padding
    keys, variation = (x if x is None else x.to(wide).expand(*p.shape[:-1], 1).reshape(-1, 1)
                       for x in (keys, variation))
    n = min(len(rows), max(1, (PIECE if p.device.type == "cpu" else 128 * PIECE) // m))
    buffers = [p.new_empty(n, m, dtype=wide) for _ in range(5)]  # allocated once: new memory is slower than computing
    for a in range(0, len(rows), n):
        piece = slice(a, a + n)
        x, gain, *scratch = (buffer[: len(rows[piece])] for buffer in buffers)
        x.copy_(rows[piece])
        row_variation = None if variation is None else variation[piece]
        gains(x, keys[piece], row_variation, torch.finfo(p.dtype).eps, zones, gain, *scratch)
        if only_factors:
            y = gain.add_(1)
        else:
            y = torch.addcmul(x, x, gain, out=scratch[0])
            if renormalize:
                y *= y.sum(-1, keepdim=True).clamp_(min=torch.finfo(y.dtype).tiny).reciprocal_()
        out.view(-1, m)[piece] = y
    return out


def gains(x, keys, variation, precision, zones, gain, v, above, high_gain):
    """Factor - 1 of weights x (n, m), written to `gain`; v, above and high_gain are scratch tensors of its shape.

    One exponential serves both zones: v = (high - s) / (high - low) is 1 at the low border and 0 at the high one. There
    g(s) / g(low) = exp(a (v - v^2)) with a = 1 / (2 width^2); above, where v < 0, it is exp(-a (slope v)^2).
    """
    (low, high), (edge, middle, border, top) = zones.borders, zones.factors
    a, tiny = 1 / (2 * zones.width**2), torch.finfo(x.dtype).eps
    if variation is None:
        total, squares = x.sum(-1, keepdim=True), torch.square(x, out=v).sum(-1, keepdim=True)
        total.clamp_(min=0.1)  # 0 in rows of padding, else near 1
        mu, variation = total / keys, (squares * keys).div_(total.square()).sub_(1)
    else:
        mu = 1 / keys
    # s = 0 if weights differ by no more than their rounding, or that of their sums
    same = variation <= max(precision**2, 16 * tiny)
    c = a * math.log2(math.e) / (high - low)  # exp2 takes a third of the time of exp
    r = variation.masked_fill(same, math.inf).rsqrt_().mul_(-c)  # -c mu / sigma
    torch.sub(x, mu, out=v).mul_(r / mu).add_(c * high)  # c (high - s), called v from here on
    # s above the border by no more than the rounding of sigma is on the border: of two keys s is always 1 or -1
    torch.lt(v, (r * r).add_(c * c).mul_(-4 * tiny / c), out=above)
    F.leaky_relu_(v, (high - low) * math.sqrt(zones.sharpness / (2 * a)))
    end = c * (high - low)
    power = torch.clamp(v, min=0, out=gain).addcmul_(v, v, value=-1 / end).exp2_()
    k = (middle - edge) / (math.exp(a / 4) - 1)
    torch.add(x.new_full((), top - 1), power, alpha=border - top, out=high_gain)
    torch.add(x.new_full((), edge - 1 - k), power, alpha=k, out=gain).lerp_(high_gain, above)
    torch.ops.aten.hardtanh_backward.grad_input(gain, v, -math.inf, end, grad_input=gain)  # 0 from `end` on
