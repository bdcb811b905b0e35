"""Cached decoding: the keys and values of a text so far, and attention of its newest tokens to them.

Letters: B batch, T time, H heads, D head size; m keys, S slots of the cache.
"""

import math

import torch

from ops import mask_value


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
    if T > 1 or layer.reweighs:
        return layer.weights(q, keys, i, j) @ values
    if layer.relative:
        return attend_by_distance(layer, q, cache, i, j)
    bias = layer.bias_at(i, j)
    slots = (bias > -math.inf).any(0)[0].nonzero()[:, 0]
    return softmax_average(q, keys.index_select(2, slots), values.index_select(2, slots), bias[:, :, slots])


def attend_by_distance(layer, q, cache, i, j):
    """`attend` of one token where the bias depends on the distance alone: only kept slots are read."""
    if cache.kept is None:
        cache.kept = kept_by_distance(layer, cache.size)
    (k, v, _), (heads, distances, bias) = cache.held(), cache.kept
    if distances is None:
        return softmax_average(q, k, v, None if bias is None else bias[:, :, i - j])
    if cache.length < cache.size:
        near = distances <= i
        heads, distances, bias = heads[near[: len(heads)]], distances[near], bias[:, :, near]
    slots = (i - distances) % cache.size
    if not len(heads):
        return softmax_average(q, k.index_select(2, slots), v.index_select(2, slots), bias)
    k, v = (x.flatten(1, 2).index_select(1, heads * cache.size + slots)[:, None] for x in (cache.k, cache.v))
    return softmax_average(q.transpose(1, 2), k, v, bias.transpose(0, 1)).transpose(1, 2)  # heads as queries: one product


def softmax_average(q, k, v, bias):
    """softmax(q k^T / sqrt(D) + bias) v; a row without a kept key gives 0. bias: None, 0 for all pairs."""
    scores = q @ k.mT / math.sqrt(q.size(3))
    if bias is None:
        return torch.softmax(scores, -1) @ v
    bias = bias.to(q.dtype).clamp(min=mask_value(q.dtype))
    return torch.softmax(scores + bias, -1).masked_fill(bias == mask_value(q.dtype), 0) @ v


def kept_by_distance(layer, size):
    """What the newest query keeps of the `size` latest positions, of a relative layer: (heads, distances, bias).

    All of them: distances is None, bias (H or 1, 1, size) by distance, or None: 0. The same in each head:
    distances (m,), bias (H or 1, 1, m), heads empty. Else all heads' distances in one row, heads (m,) naming the head
    of each, and bias (H, 1, m) that drops every head's keys for the others.
    """
    bias = layer.bias_by_offset(size)[:, :size].flip(1)[:, None]
    kept = bias[:, 0] > -math.inf
    if kept.all():
        return None, None, bias if bias.any() else None
    if (kept == kept[0]).all():
        distances = kept[0].nonzero()[:, 0]
        return distances[:0], distances, bias[:, :, distances]
    heads, distances = kept.nonzero().unbind(1)
    same_head = heads == torch.arange(len(kept), device=bias.device)[:, None, None]
    return heads, distances, bias[:, :, distances].where(same_head, -math.inf)
