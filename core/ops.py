"""Fast elementwise pieces that several files share: rotary positions, dropout, precisions of sums and masks.

Letters: B batch, T time, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def accumulate_dtype(x):
    """The dtype for sums over elements of x: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def mask_value(dtype):
    """A finite score that stands for -inf: exp() of it is exactly 0 beside any real score, a row of nothing else stays
    finite, and a fourth of the range is left for adding a score or a second mask to it."""
    return torch.finfo(dtype).min / 4


# ---- dropout -------------------------------------------------------------------------------


def dropout_mask(x, p, generator=None):
    """0 with probability p, else 1 / (1 - p), in the shape and dtype of x.

    It uses 16 random bits per element: PyTorch draws 32, one element at a time, which on a CPU takes several times as
    long as the attention that it is for.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=generator)
    dropped = round(p * 2**16)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def drop(x, p):
    """x with elements dropped at rate p."""
    if p == 0:
        return x
    return x * dropout_mask(x, p) if x.device.type == "cpu" else F.dropout(x, p)


# ---- positions -----------------------------------------------------------------------------


def rotations(positions, head_size, base=10000.0):
    """Cosines and sines of rotary positions (Su et al. 2021, section 3.2.2).

    positions: (T,) LongTensor. Returns (2, T, D / 2) in float64, for angles position * base^(-2 d / D): float32 angles
    would be wrong in the third digit at position 1e5.
    """
    d = torch.arange(0, head_size, 2, dtype=torch.float64)
    angles = torch.outer(positions.double(), base ** (-d / head_size))
    return torch.stack([angles.cos(), angles.sin()])


class Rotate(torch.autograd.Function):
    """Rotary positions on q and k, and the engine's memory order, in two passes.

    qkv (3, B, H, T, D) with any strides -> the same, contiguous, with dimensions d and d + D / 2 of q and k rotated by
    the angle. The backward pass is written by hand because autograd would keep and pad every half.
    """

    @staticmethod
    def rotate(x, cos, sin):
        half = x.size(-1) // 2
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x1, x2, y1, y2 = x[:2, ..., :half], x[:2, ..., half:], y[:2, ..., :half], y[:2, ..., half:]
        torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
        torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
        y[2] = x[2]
        return y

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotate.rotate(qkv, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.rotate(grad, cos, -sin), None, None


def split_heads(qkv, rotation=None):
    """q, k, v, each (B, H, T, D) and contiguous, from a (3, B, H, T, D) view; q and k rotated."""
    if rotation is None:
        return qkv.contiguous().unbind(0)
    cos, sin = rotation.to(qkv.dtype).unbind(0)
    rotate = Rotate.apply if torch.is_grad_enabled() else Rotate.rotate  # apply costs a decoding step 5 %
    return rotate(qkv, cos, sin).unbind(0)
