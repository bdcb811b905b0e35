"""Cached decoding: a ring of keys and values, and attention of new tokens to it.

Letters: B batch, T time, H heads, D head size; m keys.
"""

import math

import torch

from core.ops import mask_value
from core.texts import NO_TEXTS, decay_between


class Cache:
    """Keys and values of the last `size` positions of one layer, in a ring: (B, H, size, D). If the layer has forget
    gates, also their sums up to each position, (B, H, size)."""

    def __init__(self, size):
        self.size, self.length = size, 0  # length: tokens of the text so far, cached or not
        self.kept = None  # the result of `kept_by_distance`, computed once
        self.document = 0  # where the last token's document starts, (B, 1), if the model masks documents

    def extend(self, k, v, decay=None):
        """Append k, v (B, H, T, D), from position `length` on, and the sums of their gates (B, H, T), or None.

        Returns the keys and values that the new tokens may need, (B, H, m, D) in any order, their positions (m,), and
        with gates their sums (B, H, m).
        """
        T, start = k.size(2), self.length
        new = torch.arange(start, start + T, device=k.device)
        if start == 0:
            self.k, self.v = (x.new_empty(*x.shape[:2], self.size, x.size(3)) for x in (k, v))
            self.positions = torch.empty(self.size, dtype=torch.long, device=k.device)
            self.decay = None if decay is None else decay.new_empty(*decay.shape[:2], self.size)
        available = (k, v, new) if decay is None else (k, v, new, decay)
        if T > 1 and start:  # joined before the ring is written: the last token may overwrite keys that the first needs
            available = [torch.cat([old, x], dim) for old, x, dim in zip(self.filled(), available, (2, 2, 0, 2))]
        first = max(0, T - self.size)  # the first new token that is cached
        while first < T:
            slot = (start + first) % self.size
            last = min(T, first + self.size - slot)
            slots = slice(slot, slot + last - first)
            self.k[:, :, slots], self.v[:, :, slots] = k[:, :, first:last], v[:, :, first:last]
            self.positions[slots] = new[first:last]
            if decay is not None:
                self.decay[:, :, slots] = decay[:, :, first:last]
            first = last
        self.length += T
        return available if T > 1 else self.filled()

    def filled(self):
        """(keys (B, H, m, D), values, positions (m,)) of the filled slots, and with gates their sums (B, H, m)."""
        n = min(self.length, self.size)
        filled = self.k[:, :, :n], self.v[:, :, :n], self.positions[:n]
        return filled if self.decay is None else (*filled, self.decay[:, :, :n])

    def last_decay(self):
        """The sum of gates up to the last token, (B, H, 1)."""
        return self.decay[:, :, (self.length - 1) % self.size, None]


def attend(layer, q, k, v, cache, texts=NO_TEXTS):
    """Attention of new tokens q, k, v (B, H, T, D), which extend the cached text: (B, H, T, D).

    texts: the `texts.Texts` of the new tokens.
    """
    start, T = cache.length, q.size(2)
    keys, values, j, *decay = cache.extend(k, v, texts.decay)
    i = torch.arange(start, start + T, device=q.device)
    if T > 1:
        return layer.weights(q, keys, i, j, texts._replace(decay=decay[0] if decay else None)) @ values
    if layer.relative and texts.documents is None and texts.decay is None:
        return attend_by_distance(layer, q, cache, i, j)
    bias = layer.bias_at(i, j)
    slots = (bias > -math.inf).any(0)[0].nonzero()[:, 0]
    bias = bias[:, :, slots].to(q.dtype).clamp(min=mask_value(q.dtype))
    if decay:
        between = decay_between(texts.decay, decay[0][:, :, slots], True).to(q.dtype)
        bias = torch.where(bias > mask_value(q.dtype), bias + between, bias)  # (B, H, 1, m)
    if texts.documents is not None:
        bias = torch.where(j[slots] >= texts.documents[:, None, :, None], bias, mask_value(q.dtype))  # (B, H, 1, m)
    return average(layer, q, keys.index_select(2, slots), values.index_select(2, slots), bias)


def attend_by_distance(layer, q, cache, i, j):
    """`attend` for one token of a relative layer: only kept slots are read."""
    if cache.kept is None:
        cache.kept = kept_by_distance(layer, cache.size, q.dtype)
    (k, v, _), (heads, distances, bias, keeps_itself) = cache.filled(), cache.kept
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
    """reweigh(softmax(q k^T / sqrt(D) + bias)) v: (B, H, n, D).

    bias: (H or 1, n, m) or (B, H or 1, n, m) in the dtype of q, `mask_value` for dropped pairs; None: 0. keeps_itself:
    every row has a kept key; otherwise rows without one give 0.
    """
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
    """What a query of a relative layer keeps of the `size` positions up to its own: (heads, distances, bias, whether
    each head keeps the query's own key).

    If all are kept, distances is None, and bias is (H or 1, 1, size) by distance, or None: 0. If all heads keep the
    same, distances is (m,), bias (H or 1, 1, m), and heads is empty. Else the distances of all heads are joined to
    (m,), heads (m,) names the head of each, and bias (H, 1, m) drops each head's keys for the others.
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
