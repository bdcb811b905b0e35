"""Cached decoding: a ring of keys and values, and attention of new tokens to it.

Letters: B batch, T time, H heads, K key heads, G = H / K heads that share a key head, D head size; m keys.
"""

import math

import torch

from core import sinks
from core.ops import expand_heads, mask_value
from core.texts import NO_TEXTS, decay_between

AHEAD = 16  # queries whose bias is computed at once: for one, starting the operations takes longer than they do


class Cache:
    """Keys and values of one layer: of the first `first` positions, and of the last `size` positions after them in a
    ring, (B, K, first + size, D). If the layer has forget gates, also their sums, (B, H, first + size)."""

    def __init__(self, size, first=0):
        self.size, self.first, self.length = size, first, 0  # length: tokens of the text so far, cached or not
        self.rings = []  # keys, values, and with gates their sums
        self.kept = None  # the result of `kept_by_distance`, computed once
        self.ahead = 0, []  # the position of a query; slots, positions and bias of the keys that it and the next keep
        self.tokens = None  # the last ones, (B, longest n-gram - 1), if the model embeds n-grams
        self.document = 0  # where the last token's document starts, (B, 1), if the model masks documents

    def extend(self, k, v, decay=None):
        """Append k, v (B, K, T, D), from position `length` on, and the sums of their gates (B, H, T), or None.

        Returns the keys and values that the new tokens may need, (B, K, m, D), and with gates their sums (B, H, m): all
        that are cached, in the order of `positions`, or those that were, and the new ones after them.
        """
        new, T, start = (k, v) if decay is None else (k, v, decay), k.size(2), self.length
        if start == 0:
            self.rings = [x.new_empty(*x.shape[:2], self.first + self.size, *x.shape[3:]) for x in new]
        elif T > 1:  # joined before the rings are written: the last token may overwrite keys that the first needs
            joined = [torch.cat([old, x], 2) for old, x in zip(self.filled(), new)]
        a = start  # written up to here
        while a < start + T:
            if a >= self.first:
                a = max(a, start + T - self.size)  # what comes before would be overwritten
            slot = self.slot(a)
            count = min(start + T - a, (self.first if a < self.first else self.first + self.size) - slot)
            for ring, x in zip(self.rings, new):
                ring.narrow(2, slot, count).copy_(x.narrow(2, a - start, count) if T > 1 else x)
            a += count
        self.length += T
        return joined if start and T > 1 else self.filled()

    def slot(self, position):
        """Where the key of a position is, or will be."""
        return position if position < self.first else self.first + (position - self.first) % self.size

    def filled(self):
        """The filled slots: keys and values (B, K, m, D), and with gates their sums (B, H, m)."""
        n = min(self.length, self.first + self.size)
        return [ring.narrow(2, 0, n) for ring in self.rings]

    def positions(self):
        """The positions (m,) of the keys in the filled slots."""
        j, last = torch.arange(self.first + self.size, device=self.rings[0].device), self.length - 1
        if last < len(j):
            return j[: last + 1]
        return torch.where(j < self.first, j, last - (last - j) % self.size)

    def last_decay(self):
        """The sum of gates up to the last token, (B, H, 1)."""
        return self.rings[2][:, :, self.slot(self.length - 1), None]


def new_cache(layer):
    """An empty cache for a layer."""
    return Cache(layer.max_distance() + 1, layer.first_tokens)


def attend(layer, q, k, v, cache, texts=NO_TEXTS):
    """Attention of new tokens q (B, H, T, D) and k, v (B, K, T, D), which extend the cached text: (B, H, T, D).

    texts: the `texts.Texts` of the new tokens.
    """
    start, T = cache.length, q.size(2)
    cached = cache.positions() if T > 1 else None
    keys, values, *decay = cache.extend(k, v, texts.decay)
    if T > 1:
        i = torch.arange(start, start + T, device=q.device)
        j, texts = torch.cat([cached, i]), texts._replace(decay=decay[0] if decay else None)
        return layer.weights(q, keys, i, j, texts) @ expand_heads(values, q.size(1))
    grouped = q.view(len(q), layer.n_kv_head, -1, q.size(3))  # (B, K, G, D): a key is read once for its G heads
    if layer.relative and texts.documents is None and texts.decay is None:
        return attend_by_distance(layer, grouped, keys, values, start, cache).view(q.shape)
    (slots, j, bias), dropped = kept_by_query(layer, cache, start, q), mask_value(q.dtype)
    all_kept = (bias is None or bias.size(1) == 1) and texts.documents is None  # else heads or texts differ
    keys, values, *decay = (x if slots is None else x.index_select(2, slots) for x in (keys, values, *decay))
    if decay:
        between = decay_between(texts.decay, decay[0], True).to(q.dtype)
        bias = between if bias is None else torch.where(bias > dropped, bias + between, bias)  # (B, H, 1, m)
    if texts.documents is not None:
        bias = (q.new_zeros(()) if bias is None else bias).where(j >= texts.documents[:, None, :, None], dropped)
    keys = sinks.cap_distances(layer, keys, start, j)
    return average(layer, grouped, keys, values, group(layer, bias), all_kept).view(q.shape)


def kept_by_query(layer, cache, i, q):
    """Of the cached keys that the query q at position i keeps: (slots (m,), positions (m,), bias (1, H or 1, 1, m) in
    the dtype of q, None: 0). Slots are None if it keeps all, in the order of `Cache.positions`: copying all takes as
    long as reading them. First tokens are always selected, since `cap_distances` writes into the copy."""
    first, rows = cache.ahead
    if not first <= i < first + len(rows):
        queries = torch.arange(i, i + AHEAD, device=q.device)
        keys = torch.arange(max(0, i + 1 - cache.size), i + AHEAD, device=q.device)
        keys = torch.cat([torch.arange(min(cache.first, int(keys[0])), device=q.device), keys])
        bias = sinks.bias_at(layer, queries, keys)
        kept = (bias > -math.inf).any(0)  # (AHEAD, keys)
        row, column = kept.nonzero().unbind(1)
        bias = bias[:, row, column].to(q.dtype).clamp(min=mask_value(q.dtype))[None, :, None]
        positions, counts = keys[column], kept.sum(1).tolist()
        slots = torch.where(positions < cache.first, positions, cache.first + (positions - cache.first) % cache.size)
        biases = bias.split(counts, 3) if bias.any() else [None] * AHEAD
        rows = list(zip(slots.split(counts), positions.split(counts), biases))
        for n, (slots, positions, bias) in enumerate(rows):
            if not cache.first and len(slots) == min(i + n + 1, cache.size):
                order = slots.argsort()
                rows[n] = None, positions[order], None if bias is None else bias[..., order]
        first, rows = cache.ahead = i, rows
    return rows[i - first]


def group(layer, bias):
    """A bias (B or 1, H or 1, 1, m) as (B or 1, K or 1, G or 1, m). None stays None."""
    if bias is None or bias.size(1) == 1:
        return bias
    return bias.squeeze(2).unflatten(1, (layer.n_kv_head, -1))


def attend_by_distance(layer, q, k, v, i, cache):
    """`attend` for one token q (B, K, G, D) at position i of a relative layer, and the cached k, v (B, K, m, D): only
    kept slots are read."""
    if cache.kept is None:
        cache.kept = kept_by_distance(layer, cache.size, q.dtype)
    heads, distances, bias, keeps_itself = cache.kept
    if distances is None:
        by_slot = None if bias is None else bias.narrow(3, (-i - 1) % cache.size, k.size(2))
        return average(layer, q, k, v, by_slot, True)
    if cache.length < cache.size:
        near = distances <= i
        heads, distances = heads[near[: len(heads)]], distances[near]
        bias = None if bias is None else bias[..., near]
    slots = (i - distances) % cache.size
    if not len(heads):
        return average(layer, q, k.index_select(2, slots), v.index_select(2, slots), bias, keeps_itself)
    k, v = (x.flatten(1, 2).index_select(1, heads * cache.size + slots)[:, None] for x in cache.rings)
    return average(layer, q.flatten(1, 2)[:, None], k, v, bias, keeps_itself)  # heads as queries: one product


def average(layer, q, k, v, bias, keeps_itself=False):
    """reweigh(softmax(q k^T / sqrt(D) + bias)) v scaled by the sink, for the heads of each group as rows: (B, K, G, D).

    bias: (B or 1, K or 1, G or 1, m) in the dtype of q, `mask_value` for dropped pairs; None: 0.
    keeps_itself: every row has a kept key, or no key at all; otherwise rows without one give 0.
    """
    # the fused call's sums would depend on the number of threads, which `hardware.adapt_threads` changes
    scores = (q / math.sqrt(q.size(3))) @ k.mT
    if bias is not None:
        scores = scores + bias
    p = torch.softmax(scores, -1)
    dropped = None if bias is None or keeps_itself and not layer.reweighs else bias == mask_value(q.dtype)
    if dropped is not None:
        p = p.masked_fill(dropped, 0)
    if layer.reweighs:
        m = torch.full((1, 1), k.size(2), device=q.device) if dropped is None else (~dropped).sum(-1, keepdim=True)
        p = layer.reweigh(p, m.expand(*p.shape[:3], 1))
    return sinks.scale_by_sink(p @ v, scores, layer.sink())


def kept_by_distance(layer, size, dtype):
    """What a query of a relative layer keeps of the `size` positions up to its own: (heads, distances, bias, whether
    each head keeps the query's own key).

    If all heads keep the same, heads is empty, distances is (m,), and bias is (1, K or 1, G or 1, m), or None: 0. If
    all are kept, distances is None, and bias stands twice in falling order, so that a part of it follows the ring. Else
    the distances that any head of a group keeps are joined to (m,) for all groups, heads (m,) names the key head of
    each, and bias (1, 1, H, m) drops each group's keys for the others.
    """
    bias = layer.bias_by_offset(size, future=False).flip(1)[None, :, None].to(dtype)
    bias = bias.clamp(min=mask_value(dtype))
    kept = bias[0, :, 0] > mask_value(dtype)
    keeps_itself = bool(kept[:, 0].all())
    if (kept == kept[0]).all():
        distances = kept[0].nonzero()[:, 0]
        bias = group(layer, bias[..., distances]) if bias[..., distances].any() else None
        if len(distances) < size:
            return distances[:0], distances, bias, keeps_itself
        return distances[:0], None, None if bias is None else torch.cat([bias, bias], 3).flip(3), True
    heads, distances = kept.view(layer.n_kv_head, -1, size).any(1).nonzero().unbind(1)
    same_group = heads == torch.arange(layer.n_head, device=bias.device)[:, None] // (layer.n_head // layer.n_kv_head)
    return heads, distances, bias[:, :, 0, distances].where(same_group, mask_value(dtype))[None], keeps_itself


def cache_bytes(cache):
    """Bytes of all tensors that a cache holds."""
    values = [*vars(cache).values(), *cache.rings, *(cache.kept or ())]
    return sum(x.untyped_storage().nbytes() for x in values if torch.is_tensor(x))
