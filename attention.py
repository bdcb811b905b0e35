"""Attention, stated once and computed twice: a slow reference and a fast engine.

A mechanism is a subclass named `Attention` in a file of its own that overrides at most

    bias(i, j)   the mask in log space: 0 keeps a pair, -inf drops it, between is soft
    plan(T)      where the bias is not -inf, as blocks to be multiplied densely
    reweigh(p, keys)   what happens to a complete row of softmax weights

The class here is the dense mechanism and derives everything else from these three:
`weights` is the reference, `attend` the engine, `forward` the layer with its cache.

Letters: B batch, T time, C channels, H heads, D head size, S span (keys a query may see).
n and m count the queries and the keys of one block.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from configurator import UserError
from engine import FLOOR, Block, drop, engine

KERNELS = ("auto", "engine", "sdpa", "reference")


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2), dense.

    Causal: a query sees itself and the `block_size - 1` positions before it, so a text of any
    length has a meaning. Otherwise it sees every position.

    config: `GPTConfig` (n_embd, n_head, block_size, dropout, bias, causal, kernel, options).
    """

    bias_period = 1  # bias(i + this, j + this) is bias(i, j): blocks so far apart share one; 0: there is no such distance
    rescales = False  # reweigh gives p f / sum(p f) with factors f that are constants to the gradient

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.block_size, self.causal, self.layer = config.block_size, config.causal, layer
        self.dropout, self.kernel = config.dropout, config.kernel
        self.options = SimpleNamespace(**config.options)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    # ---- the mechanism: what a subclass overrides ------------------------------------------

    def bias(self, i, j):
        """The mask in log space, (H or 1, len(i), len(j)), for positions i and j (LongTensors)."""
        if not self.causal:
            return torch.zeros(1, len(i), len(j), device=i.device)
        distance = i[:, None] - j[None]
        return torch.where((distance >= 0) & (distance < self.block_size), 0.0, -math.inf)[None]

    def plan(self, T):
        """Parts of blocks that cover every kept pair of a text of T tokens exactly once.

        Within a part a query of a head stands in one block. Where there is one part, that block
        holds all its keys; several parts are joined by log-sum-exp.
        """
        n = 64 if T <= 256 else 128 if T <= 1024 else 256  # small enough to skip most of the future
        pairs = self.windows(range(T), n, self.reach() if self.causal else T)
        return [[Block(range(self.n_head), queries, keys) for queries, keys in pairs]]

    def reweigh(self, p, keys, statistic=None):
        """What happens to complete rows of softmax weights (..., n, m); here nothing.

        keys: (..., n, 1), how many keys each row is about: not masked, no padding; where p has more,
        their weight is 0. statistic: in the engine the rows' part of what `statistic` returned.
        """
        return p

    def statistic(self, q, k, lengths):
        """What `reweigh` must know of each row beforehand, (B, H, T, 1), or None. In the reference,
        where p is the whole matrix, it is not asked."""
        return None

    def penalty(self):
        """A term of the loss (a scalar tensor), or 0."""
        return 0.0

    def stats(self):
        """Plain numbers, or lists of one for each head, for the log and the plots, by name."""
        T = self.block_size
        return {"kept_share": self.kept(T) / (T * (T + 1) / 2 if self.causal else T * T)}

    def reach(self):
        """The farthest distance a query can need: how long the cache must be."""
        return self.block_size - 1

    # ---- derived: nothing below is written again by a mechanism ----------------------------

    @property
    def dense(self):
        """Whether this is dense attention and nothing else, which PyTorch's fused call computes too."""
        return type(self).bias is Attention.bias and not self.reweighs

    @property
    def relative(self):
        """Whether the bias depends on i - j alone."""
        return self.bias_period == 1

    @property
    def reweighs(self):
        return type(self).reweigh is not Attention.reweigh

    def mask_parameters(self):
        """The parameters that `bias` depends on: all but the projections'."""
        return [p for name, p in self.named_parameters() if name.split(".")[0] not in ("qkv", "proj")]

    def windows(self, positions, n, reach, edge=0):
        """Yield (queries, keys), n of the `positions` (a range) at a time, with every key among them
        that lies within `reach` places; causal: no later one.

        edge: how many at a time while the window is cut off at the start, where every block has a
        shape of its own (0: n as well).
        """
        a = 0
        while a < len(positions):
            b = a + (edge or n if a < reach else n)
            yield positions[a:b], positions[max(0, a - reach) : b + (0 if self.causal else reach)]
            a = b

    def weights(self, q, k, i=None, j=None, lengths=None):
        """The reference: reweigh(softmax(q k^T / sqrt(D) + bias)), dense, slow, obvious.

        q: (B, H, n, D) at positions i, k: (B, H, m, D) at positions j (default 0, 1, ...).
        lengths: (B,) tokens of each example, the rest is padding; None: no padding.
        Returns (B, H, n, m).
        """
        i = torch.arange(q.size(2), device=q.device) if i is None else i
        j = torch.arange(k.size(2), device=q.device) if j is None else j
        bias = self.bias(i, j)
        seen = (bias > -math.inf)[None]
        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3)) + bias.to(q.dtype)
        if lengths is not None:
            there = j < lengths[:, None, None, None]
            scores, seen = scores.masked_fill(~there, FLOOR), seen & there  # finite: padding may see only padding
        return self.reweigh(torch.softmax(scores, -1, dtype=q.dtype), seen.sum(-1, keepdim=True))

    def attend(self, q, k, v, lengths=None):
        """Attention over whole texts: q, k, v (B, H, T, D) -> (B, H, T, D), in O(T) memory."""
        dropout = self.dropout if self.training else 0.0
        kernel = self.choose_kernel(q.device)
        if kernel == "reference":
            return drop(self.weights(q, k, lengths=lengths), dropout) @ v
        if kernel == "sdpa":
            mask = None
            if lengths is not None:
                mask = (torch.arange(q.size(2), device=q.device) < lengths[:, None])[:, None, None]
            elif self.causal and q.size(2) > self.block_size:
                mask = self.bias(*2 * [torch.arange(q.size(2), device=q.device)])[0].to(q.dtype)
            return F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=self.causal and mask is None
            )
        return engine(self, q, k, v, lengths, dropout, self.statistic(q, k, lengths))

    def choose_kernel(self, device):
        """'engine', 'sdpa' or 'reference': the configured one, or by 'auto' the faster for `device`.

        Raises UserError where PyTorch's fused call is asked for and cannot hold the mechanism.
        """
        if self.kernel == "sdpa" and not self.dense:
            raise UserError("kernel=sdpa computes dense attention only; for this mechanism use engine or reference")
        if self.kernel == "auto":
            return "sdpa" if self.dense and torch.device(device).type != "cpu" else "engine"
        return self.kernel

    def project(self, x, rotation=None):
        """q, k, v, each (B, H, T, D), of x (B, T, C)."""
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        return split_heads(qkv, rotation)

    def map(self, x, rotation=None, lengths=None):
        """The weights (B, H, T, T) by which `forward` of x joins values."""
        q, k, _ = self.project(x, rotation)
        return self.weights(q, k, lengths=lengths)

    def forward(self, x, rotation=None, lengths=None, cache=None):
        """x (B, T, C) -> (B, T, C).

        rotation: cosines and sines of the positions' angles (`rotations`), or None.
        lengths: (B,), see `weights`. cache: a `Cache`; x then continues the text it holds.
        """
        B, T, C = x.shape
        q, k, v = self.project(x, rotation)
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.extend(k, v)
            with torch.autocast(x.device.type, enabled=False):
                y = self.attend(q, k, v, lengths)
        elif T == 1:
            cache.extend(k, v)
            y = self.decode(q, cache)
        else:
            i = torch.arange(cache.length, cache.length + T, device=x.device)
            keys, values, j = cache.extend(k, v)
            y = self.weights(q, keys, i, j) @ values
        return drop(self.proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout if self.training else 0.0)

    def decode(self, q, cache):
        """Outputs (B, H, 1, D) of the newest token of a cache, reading only the keys its query keeps."""
        (k, v, j), i = cache.held(), torch.tensor([cache.length - 1], device=q.device)
        if self.reweighs:
            return self.weights(q, k, i, j) @ v
        if not self.bias_period:
            bias = self.bias(i, j)
            slots = (bias > -math.inf).any(0)[0].nonzero()[:, 0]
            return self.attend_to(q, k.index_select(2, slots), v.index_select(2, slots), bias[:, :, slots])
        residue = cache.length % self.bias_period
        if residue not in cache.kept:
            cache.kept[residue] = self.kept_by_distance(cache.size, residue, q.device)
        heads, distances, bias = cache.kept[residue]
        if distances is None:
            return self.attend_to(q, k, v, None if bias is None else bias[:, :, i - j])
        if cache.length < cache.size:
            near = distances <= i
            heads, distances, bias = heads[near[: len(heads)]], distances[near], bias[:, :, near]
        slots = (i - distances) % cache.size
        if not len(heads):
            return self.attend_to(q, k.index_select(2, slots), v.index_select(2, slots), bias)
        k, v = (x.flatten(1, 2).index_select(1, heads * cache.size + slots)[:, None] for x in (cache.k, cache.v))
        return self.attend_to(q.transpose(1, 2), k, v, bias.transpose(0, 1)).transpose(1, 2)  # heads as queries: one product

    @staticmethod
    def attend_to(q, k, v, bias):
        """softmax(q k^T / sqrt(D) + bias) v, where nothing else happens to the scores."""
        scores = q @ k.mT / math.sqrt(q.size(3))
        return torch.softmax(scores if bias is None else scores + bias.to(q.dtype), -1) @ v

    def kept_by_distance(self, size, residue, device):
        """What a query, the last of a text whose length modulo `bias_period` is `residue`, keeps of
        the `size` latest positions: (heads, distances, bias).

        All of them: distances is None, bias (H or 1, 1, size) by distance, or None: 0. The same in each head:
        distances (m,), bias (H or 1, 1, m). Else all heads' distances in one row, heads (m,) saying
        whose they are, and bias (H, 1, m) that keeps every head from the others'.
        """
        i = size - 1 + (residue - size) % self.bias_period
        bias = self.bias(torch.tensor([i], device=device), torch.arange(i, i - size, -1, device=device))
        kept = bias[:, 0] > -math.inf
        if kept.all():
            return None, None, bias if bias.any() else None
        if (kept == kept[0]).all():
            distances = kept[0].nonzero()[:, 0]
            return distances[:0], distances, bias[:, :, distances]
        heads, distances = kept.nonzero().unbind(1)
        own = heads == torch.arange(len(kept), device=device)[:, None, None]
        return heads, distances, bias[:, :, distances].where(own, FLOOR)

    def pairs(self, T):
        """Query-key pairs per head that the plan multiplies for a text of T tokens."""
        return sum(block.pairs for part in self.plan(T) for block in part) / self.n_head

    @torch.no_grad()
    def kept(self, T):
        """Query-key pairs per head whose bias is not -inf, for a text of T tokens."""
        device = self.proj.weight.device
        if self.relative:
            j = torch.arange(2 * T - 1, device=device)
            kept = self.bias(j[T - 1 : T], j) > -math.inf  # (H or 1, 1, offsets from 1 - T to T - 1)
            return (kept * (T - (j - T + 1).abs())).sum().item() / kept.size(0)
        total, j = 0, torch.arange(T, device=device)
        for i in j.split(256):
            bias = self.bias(i, j)
            total += (bias > -math.inf).sum().item() / bias.size(0)
        return total


# ---- positions -----------------------------------------------------------------------------


def rotations(positions, head_size, base=10000.0):
    """Cosines and sines of rotary positions (Su et al. 2021, section 3.2.2).

    positions: (T,) LongTensor. Returns (2, T, D / 2) in float64, for angles
    position * base^(-2 d / D): float32 angles would be wrong in the third digit at position 1e5.
    """
    d = torch.arange(0, head_size, 2, dtype=torch.float64)
    angles = torch.outer(positions.double(), base ** (-d / head_size))
    return torch.stack([angles.cos(), angles.sin()])


class Rotate(torch.autograd.Function):
    """Rotary positions on q and k, and the engine's memory order, in two passes.

    qkv (3, B, H, T, D) with any strides -> the same, contiguous, with dimensions d and d + D / 2
    of q and k turned by the angle. By hand because autograd would keep and pad every half.
    """

    @staticmethod
    def turn(x, cos, sin):
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
        return Rotate.turn(qkv, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.turn(grad, cos, -sin), None, None


def split_heads(qkv, rotation=None):
    """q, k, v, each (B, H, T, D) and contiguous, from a (3, B, H, T, D) view; q and k rotated."""
    if rotation is None:
        return qkv.contiguous().unbind(0)
    cos, sin = rotation.to(qkv.dtype).unbind(0)
    turn = Rotate.apply if torch.is_grad_enabled() else Rotate.turn  # apply costs a decoding step 5 %
    return turn(qkv, cos, sin).unbind(0)


# ---- cache ---------------------------------------------------------------------------------


class Cache:
    """Keys and values of the last `size` positions of one layer, in a ring: (B, H, size, D)."""

    def __init__(self, size):
        self.size, self.length = size, 0  # length: tokens seen so far, kept or not
        self.kept = {}  # `Attention.kept_by_distance` by residue, once it is known

    def extend(self, k, v):
        """Append k, v (B, H, T, D), from position `length` on.

        Returns the keys and values that the new tokens may need, (B, H, m, D) in any order, and
        their positions (m,).
        """
        T, start = k.size(2), self.length
        new = torch.arange(start, start + T, device=k.device)
        if start == 0:
            self.k, self.v = (x.new_empty(*x.shape[:2], self.size, x.size(3)) for x in (k, v))
            self.positions = torch.empty(self.size, dtype=torch.long, device=k.device)
        every = k, v, new
        if T > 1 and start:  # together before the ring is written: the first new token may need what the last displaces
            every = [torch.cat([old, x], dim) for old, x, dim in zip(self.held(), every, (2, 2, 0))]
        first = max(0, T - self.size)  # of the new ones, the first that stays
        while first < T:
            slot = (start + first) % self.size
            last = min(T, first + self.size - slot)
            there = slice(slot, slot + last - first)
            self.k[:, :, there], self.v[:, :, there] = k[:, :, first:last], v[:, :, first:last]
            self.positions[there] = new[first:last]
            first = last
        self.length += T
        return every if T > 1 else self.held()

    def held(self):
        """(keys, values, positions) of the slots that are filled."""
        if self.length >= self.size:
            return self.k, self.v, self.positions
        return self.k[:, :, : self.length], self.v[:, :, : self.length], self.positions[: self.length]


if __name__ == "__main__":
    import pattern

    pattern.show_pattern("dense")
