"""The choice of an attention kernel, and PyTorch's fused call for dense attention.

Letters: B batch, T time, H heads, K key heads, D head size.
"""

import math

import torch
import torch.nn.functional as F

from core import engine, flex
from core.config import UserError
from core.ops import drop, expand_heads

KERNELS = ("auto", "engine", "flex", "sdpa", "reference")


def is_dense(layer):
    """Whether this is plain dense attention, which `scaled_dot_product_attention` computes, up to the block size."""
    if layer.gates or layer.reweighs or layer.sink() is not None or not layer.relative or layer.mask_parameters():
        return False
    bias, T = layer.bias_by_offset(layer.block_size), layer.block_size
    return not bias[:, : T if layer.causal else None].any()


def choose_kernel(layer, device, dtype, T=0):
    """The kernel for a text of T tokens in a dtype: the configured one, or for 'auto' the fastest: 'engine', 'flex' or
    'sdpa'. On a CPU, `sdpa` is faster for dense attention in float32; the engine is in bfloat16, and with dropout.

    Raises UserError if the configured kernel cannot compute the mechanism, or not on this device.
    """
    kind = torch.device(device).type
    if layer.kernel == "sdpa" and not layer.dense:
        raise UserError("kernel=sdpa computes dense attention only; for this mechanism use engine, flex or reference")
    if layer.kernel == "flex" and kind == "cpu":
        raise UserError("kernel=flex needs CUDA (FlexAttention has no backward pass on a CPU); use engine or reference")
    if layer.kernel == "auto":
        fused = layer.dense and not layer.document_mask and T <= layer.block_size  # else it needs a T x T mask
        if kind == "cpu":
            fused = fused and dtype != torch.bfloat16 and not (layer.training and layer.dropout)
        return "sdpa" if fused else "flex" if kind == "cuda" else "engine"
    return layer.kernel


def attend(layer, q, k, v, texts, dropout=0.0):
    """Attention of q (B, H, T, D) to k, v (B, K, T, D) over whole texts (a `texts.Texts`) by the layer's kernel:
    (B, H, T, D). All kernels but the reference use O(T) memory; with documents, and past the block size, `sdpa` makes a
    T x T mask.
    """
    kernel = layer.choose_kernel(q.device, q.dtype, q.size(2))
    if kernel == "reference":
        return drop(layer.weights(q, k, texts=texts), dropout) @ expand_heads(v, q.size(1))
    if texts.decay is not None:
        with torch.no_grad():
            texts = texts._replace(least=layer.least_decay(q, k))
    return {"engine": engine.attend, "flex": flex.attend, "sdpa": sdpa}[kernel](layer, q, k, v, texts, dropout)


def sdpa(layer, q, k, v, texts, dropout=0.0):
    """Dense attention by `scaled_dot_product_attention`: see `attend`."""
    mask, position = None, torch.arange(q.size(2), device=q.device)
    if texts.documents is not None or q.size(2) > layer.block_size:
        bias = layer.bias_at(position, position)[None]
        kept = texts.restrict(bias > -math.inf, position, position, layer.causal)
        mask = bias.to(q.dtype).masked_fill(~kept, -math.inf)
    elif texts.lengths is not None and not layer.causal:  # a causal text sees none of the padding after it
        mask = (position < texts.lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=layer.causal and mask is None,
                                          enable_gqa=k.size(1) < q.size(1))
