"""The CPU kernel: blocked attention with forward and backward passes in O(T) memory.

The engine computes one tile of scores at a time (core/tiles.py), where a mechanism's blocks say (core/blocks.py), adds
the bias, and takes the softmax. The backward pass recomputes the scores instead of storing them.

Letters: B batch, T time, H heads, D head size, E any last dimension.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from core import blocks, sinks
from core.ops import accumulate_dtype, expand_heads, mask_value, matrix_variation
from core.texts import NO_TEXTS, PackedTexts
from core.tiles import Tiles


def attend(layer, q, k, v, texts=NO_TEXTS, dropout=0.0):
    """Attention by `layer`'s bias and blocks, equal to `layer.weights(q, k) @ v`: (B, H, T, D).

    q: (B, H, T, D). k, v: (B, K, T, D), expanded to H heads, which costs little beside the products. texts: a
    `texts.Texts`. It has first derivatives only. Raises ValueError if the layer reweighs but its blocks have several
    parts, because `factor` needs complete rows.
    """
    B, H = q.shape[:2]
    k, v = expand_heads(k, H), expand_heads(v, H)
    qkv = q, k, v
    parts = stacks_of(layer, q.size(2))
    same_heads, keeps_itself = diagonal(layer, q.size(2))
    variation = None
    if layer.reweighs and layer.scope == "matrix":
        squares = row_squares(layer, q, k, texts)
        variation = matrix_variation(squares, texts).expand_as(squares)
    parts, packed, q, k, v, variation = pack_heads(layer, parts, same_heads, texts, q, k, v, variation)
    if layer.reweighs and len(parts) > 1:
        raise ValueError(f"factor needs complete rows, blocks of one part; these have {len(parts)}")
    seed = int(torch.randint(2**62, ())) if dropout else 0  # from the global generator, which resuming restores
    parameters = [p for p in layer.mask_parameters() if p.requires_grad]
    needs_lse, results = len(parts) > 1 or sinks.needs_lse(layer, qkv[0].size(2)), []
    for n, stacks in enumerate(parts):
        options = {"may_be_empty": not keeps_itself, "texts": packed._replace(decay=None), "dropout": dropout,
                   "seed": seed + n, "variation": variation, "joined": needs_lse}
        results.append(Engine.apply(layer, stacks, options, q, k, v, packed.decay, *parameters))
    y, lse = results[0]
    for other, other_lse in results[1:]:  # softmax over all keys: parts are weighted by their sums of exponentials
        y = torch.lerp(y, other, torch.sigmoid(other_lse - lse).to(y.dtype))
        lse = torch.logaddexp(lse, other_lse)
    if needs_lse and not keeps_itself:
        y = y.masked_fill(lse < mask_value(q.dtype) / 2, 0)  # rows without a kept key
    y, lse = unpack_heads(y, B, H), unpack_heads(lse, B, H) if needs_lse else None
    return sinks.complete(layer, y, lse, *qkv, texts, dropout)


def pack_heads(layer, parts, same_heads, texts, q, *others):
    """(parts as stacks, `PackedTexts`, q, *others) in the engine's memory order: contiguous (H, B, T, E).

    parts: from `stacks_of`. q and others: (B, H, T, E), or None. Heads that share bias and blocks become more examples,
    (1, B H, T, E), without a copy.
    """
    B, H = q.shape[:2]
    folded = same_heads and all(len(s.block.heads) == H for part in parts for s in part)
    if folded:
        parts = [[s._replace(block=s.block._replace(heads=range(1))) for s in part] for part in parts]

    def pack(x):
        if x is None:
            return None
        return x.contiguous().view(1, B * H, *x.shape[2:]) if folded else x.transpose(0, 1).contiguous()

    def pack_rows(x):  # (B, H or 1, T)
        return x if x is None else pack(x.expand(-1, H, -1)[..., None])

    lengths, documents = (x.repeat_interleave(H, 0) if folded and x is not None else x for x in texts[:2])
    limits = [pack_rows(x) for x in texts.key_limits(layer.causal)] if texts.limits_keys else None
    return parts, PackedTexts(lengths, documents, pack_rows(texts.decay), limits), *map(pack, (q, *others))


def unpack_heads(x, B, H):
    """The inverse of `pack_heads` for one tensor: (B, H, T, E)."""
    return x.view(B, H, *x.shape[2:]) if x.size(1) == B * H else x.transpose(0, 1)


def stacks_of(layer, T):
    """The layer's parts for a text of T tokens, as stacks; cached while `blocks.find` returns the same object."""
    parts, key = blocks.find(layer, T), (T, "stacks")
    if key not in layer.blocks_of or layer.blocks_of[key][0] is not parts:
        layer.blocks_of[key] = parts, [blocks.stack(layer, part) for part in parts]
    return layer.blocks_of[key][1]


@torch.no_grad()
def diagonal(layer, T):
    """(whether all heads share the bias, whether every query of a text of T tokens keeps its own key).

    If every query keeps its own key, no row is empty, with any padding. Call `stacks_of` first: where it derived a
    relative layer's blocks, the kept offsets are known.
    """
    kept, _, parts = layer.blocks_of.get((T, "derived"), (None, None, None))
    if kept is not None and parts is layer.blocks_of[T, "stacks"][0]:
        return len(kept) == 1, bool(kept[:, T - 1].all())
    key, i = (T, "diagonal"), torch.arange(T, device=layer.proj.weight.device)
    if key not in layer.blocks_of or layer.mask_parameters():
        h, i = torch.arange(layer.n_head, device=i.device)[:, None], i[-1:] if layer.relative else i
        bias = layer.total_bias(h, i, i)
        layer.blocks_of[key] = bias.dim() < 2 or len(bias) == 1, bool((bias > -math.inf).all())
    return layer.blocks_of[key]


@torch.no_grad()
def row_squares(layer, q, k, texts=NO_TEXTS):
    """The sum of squares of each query's softmax weights, (B, H, T, 1). The blocks must have one part."""
    B, H = q.shape[:2]
    parts = stacks_of(layer, q.size(2))
    same_heads, keeps_itself = diagonal(layer, q.size(2))
    (stacks,), texts, q, k = pack_heads(layer, parts, same_heads, texts, q, k)
    squares = q.new_zeros(*q.shape[:3], 1, dtype=accumulate_dtype(q))
    for tile in Tiles(layer, stacks, q, may_be_empty=not keeps_itself, texts=texts, decay=texts.decay):
        s = tile.scores(tile.gather(q, tile.queries), tile.gather_keys(k))
        p = tile.without_empty_rows(torch.softmax(s, -1, dtype=squares.dtype), s)
        tile.put(squares, tile.queries, p.square_().sum(-1, keepdim=True))
    return unpack_heads(squares, B, H)


class Engine(torch.autograd.Function):
    """One part of the blocks: its output (H, B, T, D), and the log-sum-exp of each row of scores (H, B, T, 1) if other
    parts or a sink are joined to it, else None."""

    @staticmethod
    def forward(ctx, layer, stacks, options, q, k, v, decay, *parameters):
        tiles = Tiles(layer, stacks, q, decay=decay, **options)
        out = tiles.new(v)
        lse = v.new_full((*v.shape[:3], 1), mask_value(q.dtype), dtype=accumulate_dtype(v)) if tiles.joined else None
        for tile in tiles:
            s = tile.scores(tile.gather(q, tile.queries), tile.gather_keys(k))
            largest = s.amax(-1, keepdim=True) if tiles.joined or tiles.may_be_empty else None
            p = torch.softmax(s, -1, out=s)
            if tiles.joined:  # the largest weight is exp(largest - lse)
                tile.put(lse, tile.queries, largest.to(lse.dtype) - p.amax(-1, keepdim=True).to(lse.dtype).log_())
            p = tile.reweigh(tile.without_empty_rows(p, largest))
            tile.put(out, tile.queries, torch.bmm(tile.drop(p), tile.gather_keys(v)))
        ctx.save_for_backward(q, k, v, decay, *parameters)
        ctx.layer, ctx.stacks, ctx.options = layer, stacks, options
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        q, k, v, decay, *parameters = ctx.saved_tensors
        tiles = Tiles(ctx.layer, ctx.stacks, q, parameters, decay=decay, **ctx.options)
        grad, scale = grad.contiguous(), q.size(-1) ** -0.5
        grad_lse = grad_lse.contiguous() if tiles.joined else None
        dq = tiles.new(q)
        dk, dv = (torch.zeros_like(x, dtype=accumulate_dtype(x)) for x in (k, v))  # sums over many blocks
        d_decay = torch.zeros_like(decay) if decay is not None else None
        for tile in tiles:
            queries, keys, g = tile.gather(q, tile.queries), tile.gather_keys(k), tile.gather(grad, tile.queries)
            s = tile.scores(queries, keys)
            largest = s.amax(-1, keepdim=True) if tiles.may_be_empty else None
            p = tile.without_empty_rows(torch.softmax(s, -1, out=s), largest)
            dp = tile.drop(torch.bmm(g, tile.gather_keys(v).mT))
            softmax = used = tile.reweigh(p)  # p f / sum(p f) is softmax(s + log f)
            if not ctx.layer.reweighs or not ctx.layer.renormalize:
                softmax = p
            if ctx.layer.reweighs and not ctx.layer.renormalize:  # p f
                dp.mul_(torch.where(p > 0, used / p, 0))
            tile.scatter_add(dv, torch.bmm(tile.drop(used).mT, g))
            ds = torch.ops.aten._softmax_backward_data.out(dp, softmax, -1, p.dtype, grad_input=dp)
            if tiles.joined:
                ds.addcmul_(p, tile.gather(grad_lse, tile.queries).to(p.dtype))
            tile.put(dq, tile.queries, scaled_bmm(ds, keys, scale))
            tile.scatter_add(dk, scaled_bmm(ds.mT, queries, scale))
            tile.add_bias_gradient(ds)
            tile.add_decay_gradient(d_decay, ds)
        return None, None, None, dq, dk.to(k.dtype), dv.to(v.dtype), d_decay, *tiles.gradients


def scaled_bmm(a, b, scale):
    """scale * a @ b for batches of matrices."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
