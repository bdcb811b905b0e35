"""What takes part in a row's softmax beside the keys that the kernels multiply: a sink, and first tokens far away.

The kernels compute the keys within `block_size`. A layer with `first_tokens` = g lets causal queries see the first g
positions at any distance: here they are joined to a kernel's result by their log-sum-exp. The rotation of a first token
counts its distance up to block_size - 1, the largest of training. (StreamingLLM counts positions in the cache, Xiao et
al. 2023, section 3.2; the true distance, which no training has seen, loses more than the first tokens are worth.)

Letters: B batch, T time, H heads, K key heads, D head size; n queries, m keys, g first tokens.
"""

import math

import torch

from core.ops import accumulate_dtype, drop, expand_heads, mask_value, rotated, rotations
from core.texts import NO_TEXTS, decay_between


def needs_lse(layer, T):
    """Whether `complete` needs the log-sum-exp of each row of scores of a text of T tokens."""
    return layer.sink() is not None or layer.causal and layer.first_tokens > 0 and T > layer.block_size


def complete(layer, y, lse, q, k, v, texts=NO_TEXTS, dropout=0.0):
    """The output of a layer (B, H, T, D) from y and lse (B, H, T, 1) of the keys within `block_size`.

    q: (B, H, T, D); k, v: (B, K, T, D) or expanded. lse may be None if not `needs_lse`. texts: a `texts.Texts`.
    """
    T = q.size(2)
    if layer.causal and layer.first_tokens and T > layer.block_size:
        i, j = torch.arange(T, device=q.device), torch.arange(layer.first_tokens, device=q.device)
        k, v = (expand_heads(x[:, :, : len(j)], q.size(1)) for x in (k, v))
        bias = bias_at(layer, i, j).to(q.dtype)
        kept = texts.restrict((is_far(layer, i, j) & (bias > -math.inf))[None], i, j, True)
        scores = capped_scores(layer, q, k, i, j) + bias
        if texts.decay is not None:
            scores = scores + decay_between(texts.decay, texts.decay[..., : len(j)], True).to(q.dtype)
        scores = scores.masked_fill(~kept, mask_value(q.dtype))
        far = drop(torch.softmax(scores, -1).masked_fill(~kept, 0), dropout) @ v
        far_lse = torch.logsumexp(scores.to(accumulate_dtype(q)), -1, keepdim=True)
        y, lse = torch.lerp(y, far, torch.sigmoid(far_lse - lse).to(y.dtype)), torch.logaddexp(lse, far_lse)
    return scale_by_sink(y, lse, layer.sink())


def scale_by_sink(y, scores, sink):
    """y times the share of the softmax that the keys get beside a sink: sigmoid(log-sum-exp of their scores - sink).

    y: (B, K, n, E), weights or outputs. scores: (B, K, n, m), or their log-sum-exp with m = 1. sink: the logits (H,) of
    H = K heads, or of K x n; None: none.
    """
    if sink is None:
        return y
    lse = torch.logsumexp(scores.to(accumulate_dtype(scores)), -1, keepdim=True)
    return y * torch.sigmoid(lse - sink.view(y.size(1), -1, 1)).to(y.dtype)


# ---- first tokens ----------------------------------------------------------------------------


def is_far(layer, i, j):
    """Whether key j (m,) is a first token beyond `block_size` from query i (n,): (n, m)."""
    return (i[:, None] - j >= layer.block_size) & (j < layer.first_tokens)


def bias_at(layer, i, j):
    """`layer.bias_at`, and the bias of first tokens far away: (H or 1, n, m)."""
    bias = layer.bias_at(i, j)
    if not (layer.causal and layer.first_tokens):
        return bias
    h = torch.arange(layer.n_head, device=i.device)[:, None, None]
    return torch.where(is_far(layer, i, j), layer.bias(h, i[:, None], j), bias)


def capped_scores(layer, q, k, i, j):
    """q k^T / sqrt(D) of q (B, H, n, D) at i and k (B, H, m, D) at j, as if they were block_size - 1 apart."""
    if layer.rotary:
        q = rotated(q[None], rotations(layer.block_size - 1 - i, q.size(3)).to(q.device), 1)[0]
        k = rotated(k[None], rotations(-j, q.size(3)).to(q.device), 1)[0]
    return q @ k.mT / math.sqrt(q.size(3))


def scores_at(layer, q, k, i, j):
    """q k^T / sqrt(D) with capped distances of first tokens: q (B, H, n, D), k (B, H, m, D) -> (B, H, n, m)."""
    scores = q @ k.mT / math.sqrt(q.size(3))
    if not (layer.causal and layer.first_tokens and layer.rotary):
        return scores
    first = (j < layer.first_tokens).nonzero()[:, 0]
    capped = capped_scores(layer, q, k[:, :, first], i, j[first])
    return scores.index_copy(3, first, torch.where(is_far(layer, i, j[first]), capped, scores[..., first]))


def cap_distances(layer, k, i, j):
    """Keys k (B, K, m, D) at positions j, with those of first tokens turned as if at most block_size - 1 before the
    query at position i. First tokens come first."""
    if layer.first_tokens and layer.rotary:
        g = int((j < layer.first_tokens).sum())
        shift = (i - j[:g] - (layer.block_size - 1)).clamp(min=0)
        k[:, :, :g] = rotated(k[None, :, :, :g], rotations(shift, k.size(3)).to(k.device), 1)[0]
    return k
