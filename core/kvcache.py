"""Cached decoding: the keys and values of a text so far, and attention of its newest tokens to them.

Letters: B batch, T time, H heads, D head size; m keys, S slots of the cache.
"""

import math

import torch

from core.ops import mask_value


class Cache:
    """Keys and values of the last `size` positions of one layer, in a ring: (B, H, size, D)."""

    def __init__(self, size):
        self.size, self.length = size, 0  # length: tokens seen so far, kept or not
        self.kept = None  # `kept_by_distance`, once it is known

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
        if T > 1 and start:  # joined before the ring is written: the first new token may need what the last displaces
            every = [torch.cat([old, x], dim) for old, x, dim in zip(self.held(), every, (2, 2, 0))]
        first = max(0, T - self.size)  # of the new ones, the first that stays
        while first < T:
            slot = (start + first) % self.size
            last = min(T, first + self.size - slot)
            slots = slice(slot, slot + last - first)
            self.k[:, :, slots], self.v[:, :, slots] = k[:, :, first:last], v[:, :, first:last]
            self.positions[slots] = new[first:last]
            first = last
        self.length += T
        return every if T > 1 else self.held()

    def held(self):
        """(keys, values, positions) of the slots that are filled."""
        if self.length >= self.size:
            return self.k, self.v, self.positions
        return self.k[:, :, : self.length], self.v[:, :, : self.length], self.positions[: self.length]


def attend(layer, q, k, v, cache):
    """Outputs (B, H, T, D) of new tokens q, k, v (B, H, T, D) that continue the text of a cache, which is extended."""
    start, T = cache.length, q.size(2)
    keys, values, j = cache.extend(k, v)
    i = torch.arange(start, start + T, device=q.device)
    if T > 1:
        return layer.weights(q, keys, i, j) @ values
    if layer.relative:
        return attend_by_distance(layer, q, cache, i, j)
    bias = layer.bias_at(i, j)
    slots = (bias > -math.inf).any(0)[0].nonzero()[:, 0]
    bias = bias[:, :, slots].to(q.dtype).clamp(min=mask_value(q.dtype))
    return average(layer, q, keys.index_select(2, slots), values.index_select(2, slots), bias)


def attend_by_distance(layer, q, cache, i, j):
    """`attend` of one token where the bias depends on the distance alone: only kept slots are read."""
    if cache.kept is None:
        cache.kept = kept_by_distance(layer, cache.size, q.dtype)
    (k, v, _), (heads, distances, bias, keeps_itself) = cache.held(), cache.kept
    if distances is None:
        return average(layer, q, k, v, None if bias is None else bias[:, :, i - j], True)
    if cache.length < cache.size:
        near = distances <= i
        heads, distances, bias = heads[near[: len(heads)]], distances[near], bias[:, :, near]
    slots = (i - distances) % cache.size
    if not len(heads):
        return average(layer, q, k.index_select(2, slots), v.index_select(2, slots), bias, keeps_itself)
    k, v = (x.flatten(1, 2).index_select(1, heads * cache.size + slots)[:, None] for x in (cache.k, cache.v))
    q, bias = q.transpose(1, 2), bias.transpose(0, 1)  # heads as queries: one product
    return average(layer, q, k, v, bias, keeps_itself).transpose(1, 2)


def average(layer, q, k, v, bias, keeps_itself=False):
    """reweigh(softmax(q k^T / sqrt(D) + bias)) v. bias: of the dtype of q, `mask_value` for dropped pairs; None: 0 for all.
    keeps_itself: no row is without a kept key; else such a row gives 0."""
    scores = q @ k.mT / math.sqrt(q.size(3))
    p = torch.softmax(scores if bias is None else scores + bias, -1)
    dropped = None if bias is None or keeps_itself and not layer.reweighs else bias == mask_value(q.dtype)
    if dropped is not None:
        p = p.masked_fill(dropped, 0)
    if layer.reweighs:
        m = torch.full((1, 1), k.size(2), device=q.device) if dropped is None else (~dropped).sum(-1, keepdim=True)
        p = layer.reweigh(p, m.expand(*p.shape[:3], 1))
    return p @ v


def kept_by_distance(layer, size, dtype):
    """What the newest query keeps of the `size` latest positions, of a relative layer: (heads, distances, bias, whether
    each head keeps the query's own key).

    All of them: distances is None, bias (H or 1, 1, size) by distance, or None: 0. The same in each head:
    distances (m,), bias (H or 1, 1, m), heads empty. Else all heads' distances in one row, heads (m,) naming the head
    of each, and bias (H, 1, m) that drops every head's keys for the others.
    """
    bias = layer.bias_by_offset(size, future=False).flip(1)[:, None].to(dtype).clamp(min=mask_value(dtype))
    kept = bias[:, 0] > mask_value(dtype)
    if kept.all():
        return None, None, bias if bias.any() else None, True
    keeps_itself = bool(kept[:, 0].all())
    if (kept == kept[0]).all():
        distances = kept[0].nonzero()[:, 0]
        return distances[:0], distances, bias[:, :, distances], keeps_itself
    heads, distances = kept.nonzero().unbind(1)
    same_head = heads == torch.arange(len(kept), device=bias.device)[:, None, None]
    return heads, distances, bias[:, :, distances].where(same_head, mask_value(dtype)), keeps_itself
