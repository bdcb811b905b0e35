"""The choice of an attention kernel, and PyTorch's fused call for dense attention.

Letters: B batch, T time, H heads, K key heads, D head size.
"""

import torch
import torch.nn.functional as F

from core import engine, flex
from core.config import UserError
from core.ops import drop, expand_heads

KERNELS = ("auto", "engine", "flex", "sdpa", "reference")


def choose_kernel(layer, device):
    """The layer's configured kernel, where 'auto' is resolved by the device: 'engine', 'flex', 'sdpa' or 'reference'.

    Raises UserError if the configured kernel cannot compute the mechanism, or not on this device.
    """
    kind = torch.device(device).type
    if layer.kernel == "sdpa" and not layer.dense:
        raise UserError("kernel=sdpa computes dense attention only; for this mechanism use engine, flex or reference")
    if layer.kernel == "flex" and kind == "cpu":
        raise UserError("kernel=flex needs CUDA (FlexAttention has no backward pass on a CPU); use engine or reference")
    if layer.kernel == "auto":
        return "sdpa" if layer.dense and kind != "cpu" else "flex" if kind == "cuda" else "engine"
    return layer.kernel


def attend(layer, q, k, v, lengths=None, dropout=0.0):
    """Attention of q (B, H, T, D) to k, v (B, K, T, D) by the layer's kernel: (B, H, T, D). lengths: (B,) or None."""
    kernel = choose_kernel(layer, q.device)
    if kernel == "reference":
        return drop(layer.weights(q, k, lengths=lengths), dropout) @ expand_heads(v, q.size(1))
    return {"engine": engine.attend, "flex": flex.attend, "sdpa": sdpa}[kernel](layer, q, k, v, lengths, dropout)


def sdpa(layer, q, k, v, lengths=None, dropout=0.0):
    """Dense attention by `scaled_dot_product_attention`: see `attend`."""
    mask, position = None, torch.arange(q.size(2), device=q.device)
    if lengths is not None:
        mask = (position < lengths[:, None])[:, None, None]
    elif layer.causal and q.size(2) > layer.block_size:
        mask = layer.bias_at(position, position)[0].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=layer.causal and mask is None,
                                          enable_gqa=k.size(1) < q.size(1))
