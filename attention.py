"""Attention from one formula: what a mechanism states, and the layer that computes it.

A mechanism is a subclass named `Attention` in a file of its own. It states its formula, elementwise:

    bias(h, i, j)   added to the score of head h, query position i, key position j: 0 keeps the pair, -inf drops it,
                    anything between is a soft mask

From it the class here derives a dense reference (`weights`), a blocked CPU kernel (engine.py), a FlexAttention kernel
for CUDA (flex.py), cached decoding (kvcache.py) and pictures. `python attention.py NAME --T=64` draws a mechanism and
checks that all of them agree. The class itself is dense attention.

Letters: B batch, T time, C channels, H heads, D head size; n queries and m keys.
"""

import math
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from core import blocks, flex, kvcache
from core.config import UserError
from core.engine import engine
from core.ops import accumulate_dtype, drop, mask_value, split_heads

KERNELS = ("auto", "engine", "flex", "sdpa", "reference")


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2).

    Causal: a query sees itself and the `block_size - 1` positions before it, so a text of any length has a meaning.
    Otherwise it sees every position. A query that keeps no key gives 0, with gradient 0.

    config: `GPTConfig` (n_embd, n_head, block_size, dropout, bias, causal, kernel, options).
    """

    relative = False  # True: bias depends on i - j alone, so that blocks may share it
    scope = "row"  # what `factor` ranks a weight among: its row, or 'matrix', all weights of a head of an example
    renormalize = True  # whether the weights times `factor` are divided by their sum

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.block_size, self.causal, self.layer = config.block_size, config.causal, layer
        self.dropout, self.kernel = config.dropout, config.kernel
        self.options = SimpleNamespace(**config.options)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if type(self).bias is Attention.bias:  # 0 depends on nothing
            self.relative = True
        self.blocks_of = {}  # what was derived for a T: used again while nothing that it depends on changes

    # ---- the mechanism: `bias` is its formula, each of the others has a default that is right ------------------

    def bias(self, h, i, j):
        """What is added to the score of head h, query position i, key position j: a tensor or a number.

        h, i, j: integer tensors that broadcast against each other; written elementwise (`self.slopes[h]`, `i - j`), the
        same line serves rows, blocks and single pairs. Differentiable in the mechanism's parameters. Causality and
        `block_size` are applied by `total_bias`.
        """
        return 0.0

    def blocks(self, T):
        """Parts of `blocks.Block`s that cover every kept pair of a text of T tokens exactly once: where to multiply.

        Derived from `bias`. To be written by hand only for patterns whose best shape that does not find: within a part a
        query of a head stands in one block; several parts are joined by log-sum-exp.
        """
        return blocks.derive(self, T)

    def factor(self, p, keys, variation):
        """Elementwise factor on softmax weights, detached: y = p f / sum(p f), or p f without `renormalize`.

        p: weights; keys: number of unmasked keys in the row of each; variation: (sigma / mu)^2 of the weights that it is
        ranked among (`scope`). All broadcast. None: weights stay as they are.
        """
        return None

    def reweigh(self, p, keys, variation=None):
        """Complete rows of softmax weights (..., n, m) times `factor`. Override it only to compute the same faster.

        keys: (..., n, 1); variation: (..., n or 1, 1), or None: that of each row.
        """
        keys = keys.clamp(min=1)  # 0 in a row of padding
        x = p.detach().to(accumulate_dtype(p))
        if variation is None:
            x = x / x.sum(-1, keepdim=True).clamp(min=0.1)  # but for rounding they sum to 1, or to 0
            variation = x.square().sum(-1, keepdim=True) * keys - 1
        y = p * self.factor(x, keys, variation).to(p.dtype)
        total = y.sum(-1, keepdim=True)
        return y / total.masked_fill(total == 0, 1) if self.renormalize else y

    def max_distance(self):
        """The largest distance i - j of a kept pair: how long the cache must be."""
        if not self.relative:
            return self.block_size - 1
        kept = (self.bias_by_offset(self.block_size) > -math.inf).any(0).nonzero()
        return max(0, self.block_size - 1 - int(kept[0])) if len(kept) else 0

    def penalty(self):
        """A term of the loss (a scalar tensor), or 0."""
        return 0.0

    def stats(self):
        """Plain numbers, or lists of one for each head, for the log and the plots, by name."""
        T = self.block_size
        return {"kept_share": self.kept_pairs(T) / (T * (T + 1) / 2 if self.causal else T * T)}

    # ---- derived: a mechanism writes nothing below again ---------------------------------------------------------

    def total_bias(self, h, i, j):
        """`bias`, with -inf where causality or `block_size` drops the pair; its arguments broadcast likewise."""
        bias, distance = self.bias(h, i, j), i - j
        if not self.causal:
            return bias if isinstance(bias, torch.Tensor) else 0.0 * distance + bias
        return torch.where((distance >= 0) & (distance < self.block_size), bias, -math.inf)

    def bias_at(self, i, j, heads=None):
        """`total_bias` at positions i (n,) and j (m,), of `heads` (a range; None: all): (h, n, m), or (1, n, m) where the
        formula does not use h."""
        heads = range(self.n_head) if heads is None else heads
        h = torch.arange(heads.start, heads.stop, dtype=torch.int32, device=i.device)
        bias = self.total_bias(h[:, None, None], i.int()[:, None], j.int())  # int32, as FlexAttention's: half the bytes
        return bias.expand(bias.size(0) if bias.dim() == 3 else 1, len(i), len(j))

    def bias_by_offset(self, T, future=True):
        """The bias of a relative mechanism by offset j - i from 1 - T to T - 1, or without the future to 0: (H or 1, offsets)."""
        j = torch.arange(2 * T - 1 if future else T, dtype=torch.int32, device=self.proj.weight.device)
        return self.bias_at(j[T - 1 : T], j)[:, 0]

    def mask_parameters(self):
        """The parameters that `bias` depends on: all but the projections'."""
        return [p for name, p in self.named_parameters() if name.split(".")[0] not in ("qkv", "proj")]

    @property
    def derives_blocks(self):
        return type(self).blocks is Attention.blocks

    @property
    def reweighs(self):
        return type(self).factor is not Attention.factor

    @cached_property
    def dense(self):
        """Whether this is dense attention and nothing else, which `scaled_dot_product_attention` computes too."""
        if self.reweighs or not self.relative or self.mask_parameters():
            return False
        bias, T = self.bias_by_offset(self.block_size), self.block_size
        return not bias[:, : T if self.causal else None].any()

    def choose_kernel(self, device):
        """'engine', 'flex', 'sdpa' or 'reference': the configured one; 'auto' chooses by the device.

        Raises UserError where the configured kernel cannot compute the mechanism, or not on the device.
        """
        kind = torch.device(device).type
        if self.kernel == "sdpa" and not self.dense:
            raise UserError("kernel=sdpa computes dense attention only; for this mechanism use engine, flex or reference")
        if self.kernel == "flex" and kind == "cpu":
            raise UserError("kernel=flex needs CUDA (FlexAttention has no backward pass on a CPU); use engine or reference")
        if self.kernel == "auto":
            return "sdpa" if self.dense and kind != "cpu" else "flex" if kind == "cuda" else "engine"
        return self.kernel

    def weights(self, q, k, i=None, j=None, lengths=None):
        """The reference: reweigh(softmax(q k^T / sqrt(D) + bias)), dense, slow, obvious.

        q: (B, H, n, D) at positions i, k: (B, H, m, D) at positions j (default 0, 1, ...).
        lengths: (B,) tokens of each example, the rest is padding; None: no padding.
        Returns (B, H, n, m); a row without a kept key is 0.
        """
        i = torch.arange(q.size(2), device=q.device) if i is None else i
        j = torch.arange(k.size(2), device=q.device) if j is None else j
        bias = self.bias_at(i, j)
        kept = (bias > -math.inf)[None]
        if lengths is not None:
            kept = kept & (j < lengths[:, None, None, None])
        scores = (q @ k.mT / math.sqrt(q.size(3)) + bias.to(q.dtype)).masked_fill(~kept, mask_value(q.dtype))
        p = torch.softmax(scores, -1, dtype=q.dtype).masked_fill(~kept, 0)
        if not self.reweighs:
            return p
        variation = None
        if self.scope == "matrix":
            exact = torch.softmax(scores.detach(), -1, dtype=accumulate_dtype(p)).masked_fill(~kept, 0)
            variation = self.matrix_variation(exact.square().sum(-1, keepdim=True), lengths)
        return self.reweigh(p, kept.sum(-1, keepdim=True), variation)

    @staticmethod
    def matrix_variation(squares, lengths=None):
        """(sigma / mu)^2 of all weights of a head of an example, (B, H, 1, 1), from each row's sum of squares (B, H, T, 1):
        of L^2 weights in L rows that sum to 1 the mean is 1 / L."""
        if lengths is not None:
            rows = torch.arange(squares.size(2), device=squares.device) < lengths[:, None]
            squares = squares.where(rows[:, None, :, None], 0)
        return squares.sum(2, keepdim=True) - 1

    def attend(self, q, k, v, lengths=None):
        """Attention over whole texts: q, k, v (B, H, T, D) -> (B, H, T, D). Without the reference in O(T) memory."""
        dropout = self.dropout if self.training else 0.0
        kernel = self.choose_kernel(q.device)
        if kernel == "reference":
            return drop(self.weights(q, k, lengths=lengths), dropout) @ v
        if kernel == "engine":
            return engine(self, q, k, v, lengths, dropout)
        if kernel == "flex":
            return flex.attend(self, q, k, v, lengths, dropout)
        mask = None
        if lengths is not None:
            mask = (torch.arange(q.size(2), device=q.device) < lengths[:, None])[:, None, None]
        elif self.causal and q.size(2) > self.block_size:
            mask = self.bias_at(*2 * [torch.arange(q.size(2), device=q.device)])[0].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=self.causal and mask is None)

    def project(self, x, rotation=None):
        """q, k, v, each (B, H, T, D), of x (B, T, C)."""
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        return split_heads(qkv, rotation)

    def map(self, x, rotation=None, lengths=None):
        """The weights (B, H, T, T) by which `forward` of x averages values."""
        q, k, _ = self.project(x, rotation)
        return self.weights(q, k, lengths=lengths)

    def forward(self, x, rotation=None, lengths=None, cache=None):
        """x (B, T, C) -> (B, T, C).

        rotation: cosines and sines of the positions' angles (`ops.rotations`), or None.
        lengths: (B,), see `weights`. cache: a `kvcache.Cache`; x then continues the text it holds.
        """
        B, T, C = x.shape
        q, k, v = self.project(x, rotation)
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.extend(k, v)
            with torch.autocast(x.device.type, enabled=False):
                y = self.attend(q, k, v, lengths)
        else:
            y = kvcache.attend(self, q, k, v, cache)
        return drop(self.proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout if self.training else 0.0)

    def multiplied_pairs(self, T):
        """Query-key pairs per head that the blocks multiply for a text of T tokens."""
        return sum(block.pairs for part in blocks.find(self, T) for block in part) / self.n_head

    @torch.no_grad()
    def kept_pairs(self, T):
        """Query-key pairs per head whose bias is not -inf, for a text of T tokens."""
        if self.relative:
            kept = self.bias_by_offset(T) > -math.inf
            offset = torch.arange(1 - T, T, device=kept.device)
            return (kept * (T - offset.abs())).sum().item() / kept.size(0)
        total, j = 0, torch.arange(T, device=self.proj.weight.device)
        for i in j.split(256):
            bias = self.bias_at(i, j)
            total += (bias > -math.inf).sum().item() / bias.size(0)
        return total


if __name__ == "__main__":
    from core import pattern

    pattern.show_pattern()
