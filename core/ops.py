"""Elementwise operations with hand-written fast paths: RMS normalisation, dropout, rotary positions, heads.

Letters: B batch, T time, C channels, H heads, K key heads, D head size.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from core.texts import NO_TEXTS


def accumulate_dtype(x):
    """The dtype for sums over elements of x: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def mask_value(dtype):
    """A finite score that stands for -inf.

    exp() of it is exactly 0 beside any real score, a row of such scores stays finite, and adding a score or a second
    mask does not overflow.
    """
    return torch.finfo(dtype).min / 4


class ParameterReads(TorchFunctionMode):
    """Within this context, `ids` collects the id() of each parameter that an operation reads, even without gradient."""

    def __init__(self):
        super().__init__()
        self.ids = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.ids.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter))
        return function(*args, **kwargs)


def matrix_variation(squares, texts=NO_TEXTS):
    """(sigma / mu)^2 of all softmax weights of each head and example, (B, H, 1, 1), or of each row's document,
    (B, H, T, 1).

    squares: (B, H, T, 1), each row's sum of squared weights. texts: a `texts.Texts`. For a text of L tokens, the L rows
    of L weights each sum to 1, so the mean is 1 / L.
    """
    if texts.lengths is not None:
        rows = torch.arange(squares.size(2), device=squares.device) < texts.lengths[:, None]
        squares = squares.where(rows[:, None, :, None], 0)
    if texts.documents is None:
        return squares.sum(2, keepdim=True) - 1
    documents = texts.documents[:, None, :, None].expand_as(squares)
    return torch.zeros_like(squares).scatter_add_(2, documents, squares).gather(2, documents) - 1


@torch.no_grad()
def scores_variation(scores, kept, texts=NO_TEXTS):
    """`matrix_variation` of the softmax of scores (B, H, T, T), exact also in low precision. kept: a mask of them."""
    p = torch.softmax(scores, -1, dtype=accumulate_dtype(scores)).masked_fill(~kept, 0)
    return matrix_variation(p.square().sum(-1, keepdim=True), texts)


def reweigh(p, keys, variation, factor, renormalize):
    """p f / sum(p f), or p f without `renormalize`, for the detached factor f = factor(p, keys, variation).

    p: (..., n, m), complete rows; keys: (..., n, 1); variation: (..., n or 1, 1), or None: computed per row.
    """
    keys = keys.clamp(min=1)  # 0 in a row of padding
    x = p.detach().to(accumulate_dtype(p))
    if variation is None:
        x = x / x.sum(-1, keepdim=True).clamp(min=0.1)  # the sum is 0, or 1 up to rounding
        variation = x.square().sum(-1, keepdim=True) * keys - 1
    y = p * factor(x, keys, variation).to(p.dtype)
    total = y.sum(-1, keepdim=True)
    return y / total.masked_fill(total == 0, 1) if renormalize else y


# ---- normalisation -------------------------------------------------------------------------

EPSILON = 1e-6  # added to the mean square


def rms_norm(x):
    """x / rms(x) over the last dimension (Zhang and Sennrich 2019), without a gain. Same shape and dtype as x."""
    return RMSNormFunction.apply(x) if torch.is_grad_enabled() else scale_to_unit_rms(x)[0]


def scale_to_unit_rms(x):
    """(x / rms(x), 1 / rms(x)) over the last dimension, in fewer operations than F.rms_norm."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x))
    scale = (norm.square_() / x.size(-1)).add_(EPSILON).rsqrt_()
    return (x * scale).to(x.dtype), scale


class RMSNormFunction(torch.autograd.Function):
    """RMS normalisation with a hand-written gradient, three times as fast as F.rms_norm's on a CPU."""

    @staticmethod
    def forward(ctx, x):
        y, scale = scale_to_unit_rms(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y)[..., None]
        return (torch.addcmul(grad, y, along, value=-1 / y.size(-1)) * scale).to(grad.dtype)


# ---- dropout -------------------------------------------------------------------------------


def dropout_mask(x, p, generator=None):
    """0 with probability p, else 1 / (1 - p), in the shape and dtype of x.

    It uses 16 random bits per element. PyTorch draws 32, one element at a time, which on a CPU takes several times as
    long as attention itself.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    dropped = round(p * 2**16)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def drop(x, p):
    """x with elements dropped at rate p, the rest scaled by 1 / (1 - p)."""
    if p == 0:
        return x
    return x * dropout_mask(x, p) if x.device.type == "cpu" else F.dropout(x, p)


# ---- positions -----------------------------------------------------------------------------


def rotations(positions, head_size, base=10000.0):
    """Cosines and sines of rotary positions (Su et al. 2021, section 3.2.2).

    positions: (T,) LongTensor. Returns (2, T, D / 2) in float64 for angles position * base^(-2 d / D). At position 1e5
    float32 angles would be wrong in the third digit.
    """
    d = torch.arange(0, head_size, 2, dtype=torch.float64)
    angles = torch.outer(positions.double(), base ** (-d / head_size))
    return torch.stack([angles.cos(), angles.sin()])


class Rotate(torch.autograd.Function):
    """Rotary positions, and a contiguous copy in the order the engine needs, in two passes.

    x: (N, B, H, T, D) with any strides. Returns the same shape, contiguous; dimensions d and d + D / 2 of the first
    `count` of the N are rotated by the angle. The backward pass is written by hand because autograd would keep and pad
    every half.
    """

    @staticmethod
    def rotate(x, cos, sin, count):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (x1, x2), (y1, y2) = x[:count].chunk(2, -1), y[:count].chunk(2, -1)
        torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
        torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
        y[count:] = x[count:]
        return y

    @staticmethod
    def forward(ctx, x, cos, sin, count):
        ctx.save_for_backward(cos, sin)
        ctx.count = count
        return Rotate.rotate(x, cos, sin, count)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.rotate(grad, cos, -sin, ctx.count), None, None, None


def rotated(x, rotation, count):
    """x (N, B, H, T, D) as a contiguous copy, the first `count` of the N rotated: see `split_heads`."""
    if rotation is None:
        return x.contiguous()
    cos, sin = rotation.to(x.dtype).unbind(0)
    rotate = Rotate.apply if torch.is_grad_enabled() else Rotate.rotate  # apply costs a decoding step 5 %
    return rotate(x, cos, sin, count)


# ---- heads ---------------------------------------------------------------------------------


def split_heads(x, n_head, rotation=None):
    """q (B, H, T, D), and k, v (B, K, T, D), contiguous, from x (B, T, H + 2 K, D).

    rotation: from `rotations`, (2, T, D / 2), applied to q and k; None: no rotation.
    """
    if x.size(2) == 3 * n_head:
        return rotated(x.view(*x.shape[:2], 3, n_head, -1).permute(2, 0, 3, 1, 4), rotation, 2).unbind(0)
    q, kv = x[:, :, None, :n_head], x[:, :, n_head:].unflatten(2, (2, -1))
    return *rotated(q.permute(2, 0, 3, 1, 4), rotation, 1), *rotated(kv.permute(2, 0, 3, 1, 4), rotation, 1)


def norm_heads(x, n_head, q_gain, k_gain):
    """x (B, T, H + 2 K, D) with each head of q and k divided by its root mean square and multiplied by a gain (D,).

    QK norm before the rotation (Dehghani et al. 2023, section 2), with RMS norm and gains that the heads share (Qwen3,
    2025, section 2).
    """
    kv_heads = (x.size(2) - n_head) // 2
    q, k, v = x.split((n_head, kv_heads, kv_heads), 2)
    return torch.cat([rms_norm(q) * q_gain.to(x.dtype), rms_norm(k) * k_gain.to(x.dtype), v], 2)


def expand_heads(x, n_head):
    """x (B, K, ...) with each head H / K times, (B, H, ...): a copy, or x itself if K = H. Its gradient is summed."""
    if x.size(1) == n_head:
        return x
    return x.unsqueeze(2).expand(-1, -1, n_head // x.size(1), *x.shape[2:]).flatten(1, 2)
