"""The engine's tiles: pieces of a stack of blocks that are multiplied at once, and the bias of each.

Letters: B batch, T time, H heads, D head size, E any last dimension; a tile holds h heads, b examples and s blocks of n
queries and m keys.
"""

from functools import cached_property

import torch

from core import blocks
from core.blocks import ROUND
from core.ops import accumulate_dtype, dropout_mask, mask_value
from core.texts import decay_between

# Elements in one tile of scores. In bfloat16 on a CPU several such tiles fit the shared cache; smaller tiles are slower
# because starting an operation costs microseconds.
TILE = 2**21


class Tiles:
    """Iterates over the tiles of one part of the blocks, and holds what they share.

    q: (H, B, T, D). parameters: those of the bias that need a gradient; after the last tile `gradients` holds theirs.
    may_be_empty: whether a row may have no kept key. texts: a `PackedTexts`. decay: its sums of gates. variation:
    (H, B, T, 1) for `reweigh`, or None. joined: whether other parts hold keys of the same rows, or a sink. The same
    seed gives the same dropout.
    """

    def __init__(self, layer, stacks, q, parameters=(), *, may_be_empty, texts, decay=None, dropout=0.0, seed=0,
                 variation=None, joined=False):
        self.layer, self.stacks, self.variation, self.joined = layer, stacks, variation, joined
        self.may_be_empty = may_be_empty and not joined  # then `engine.attend` finds empty rows
        self.q, self.parameters, self.dropout = q, parameters, dropout
        self.random = torch.Generator(q.device).manual_seed(seed) if dropout else None
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self.decay, self.key_limits = decay, texts.key_limits
        self.padding = self.documents = None  # or (1, B, T, 1)
        if texts.lengths is not None:
            padded = torch.arange(q.size(2), device=q.device) >= texts.lengths[:, None]
            padding = q.new_zeros(padded.shape).masked_fill_(padded, mask_value(q.dtype))
            self.padding = padding[None, ..., None]
        if texts.documents is not None:
            self.documents = texts.documents.contiguous()[None, ..., None]

    def new(self, x):
        """A tensor like x for per-query results: uninitialised if tiles write every query, else zeros."""
        if self.key_limits is not None:  # tiles without a key are left out
            return torch.zeros_like(x)
        H, T = self.q.size(0), self.q.size(2)
        written = sum(stack.count * len(stack.block.heads) * len(stack.block.queries) for stack in self.stacks)
        return torch.empty_like(x) if written == H * T else torch.zeros_like(x)

    def __iter__(self):
        B, T = self.q.shape[1:3]
        with torch.set_grad_enabled(len(self.parameters) > 0):
            row = Bias(self, self.layer.bias_by_offset(T)) if self.layer.relative else None
        # the largest first: the allocator can then reuse its memory for the smaller ones
        for stack in sorted(self.stacks, key=lambda stack: -stack.block.pairs):
            with torch.set_grad_enabled(len(self.parameters) > 0):
                block = stack.block
                bias = RelativeBias(row, block, T) if row else Bias(self, blocks.block_bias(self.layer, block))
            elements = TILE if self.q.device.type == "cpu" else 128 * TILE
            if self.key_limits is not None:  # heads and examples of one tile keep all keys that one of them needs
                elements //= 16
            limit = max(1, elements // (stack.block.pairs // len(stack.block.heads)))  # heads x examples x blocks
            n_blocks = min(limit, stack.count)
            n_batch = min(limit // n_blocks, B)
            for heads in pieces(stack.block.heads, limit // (n_blocks * n_batch)):
                for batch in pieces(range(B), n_batch):
                    for indices in pieces(range(stack.count), n_blocks):
                        tile = Tile(self, stack, bias, heads, batch, indices)
                        if tile.shape[-1]:
                            yield tile
            bias.backward()
        if row:
            row.backward()


def pieces(positions, size):
    """Split a range into ranges of at most `size`."""
    return (positions[a : a + size] for a in range(0, len(positions), size))


class Bias:
    """A bias: `value` in the dtype of q, (h or 1, n, m) of a block or (H or 1, offsets) of a relative layer, and the
    `gradient` that its tiles accumulate, or None."""

    def __init__(self, tiles, formula):
        self.tiles, self.formula = tiles, formula
        self.value = formula.detach().to(tiles.q.dtype).clamp(min=mask_value(tiles.q.dtype))
        self.gradient = None
        if formula.requires_grad:
            self.gradient = torch.zeros_like(self.value, dtype=accumulate_dtype(self.value))

    @cached_property
    def kept(self):
        """1.0 for kept pairs, else 0.0."""
        return (self.value > mask_value(self.value.dtype) / 2).to(accumulate_dtype(self.value))

    def backward(self):
        """Add the parameters' gradients to those of `tiles`."""
        if self.gradient is None:
            return
        upstream = self.gradient.to(self.formula.dtype)
        gradients = torch.autograd.grad(self.formula, self.tiles.parameters, upstream, allow_unused=True)
        for total, gradient in zip(self.tiles.gradients, gradients):
            if gradient is not None:
                total += gradient


class RelativeBias(Bias):
    """The bias of a block, (h or 1, n, m), read from `row`, the `Bias` of a relative layer by offset."""

    def __init__(self, row, block, T):
        self.row, self.block, self.T = row, block, T
        self.heads = slice(block.heads.start, block.heads.stop) if row.value.size(0) > 1 else slice(None)
        distance = torch.arange(1 - T, T, device=row.value.device).abs()
        dropped = mask_value(row.value.dtype)
        self.value = self.spread(blocks.mask_distances(row.value[self.heads], distance, block.distances, dropped))
        self.gradient = torch.zeros_like(self.value, dtype=row.gradient.dtype) if row.gradient is not None else None

    def spread(self, x):
        """x (h, 2 T - 1) by offset -> (h, n, m) by pair of the block."""
        queries, n = self.block.queries, len(self.block.queries)
        parts = []
        for keys in self.block.kv_ranges:  # from the last query to the first, since strides cannot be negative
            first = keys.start - queries[-1] + self.T - 1
            size, stride = (x.size(0), n, len(keys)), (x.stride(0), queries.step * x.stride(1), keys.step * x.stride(1))
            parts.append(x.as_strided(size, stride, x.storage_offset() + first * x.stride(1)))
        return torch.cat(parts, 2).flip(1)

    def backward(self):
        if self.gradient is not None:
            offsets = self.spread(torch.arange(2 * self.T - 1, device=self.value.device)[None])
            self.row.gradient[self.heads].index_add_(1, offsets.flatten(), self.gradient.flatten(1))


class Tile:
    """Ranges of heads, of examples (`batch`) and of the blocks of a stack (`indices`) that are multiplied at once."""

    def __init__(self, tiles, stack, bias, heads, batch, indices):
        self.tiles, self.stack, self.heads, self.batch, self.indices = tiles, stack, heads, batch, indices
        self.queries, self.kv_ranges = stack.block.queries, stack.block.kv_ranges
        columns = self.trim() if tiles.key_limits is not None and len(self.kv_ranges) == 1 else slice(None)
        first = heads.start - stack.block.heads.start
        rows = slice(first, first + len(heads)) if bias.value.size(0) > 1 else slice(None)
        self.bias = bias.value[rows, :, columns]
        self.bias_gradient = bias.gradient[rows, :, columns] if bias.gradient is not None else None
        self.kept = bias.kept[rows, :, columns] if tiles.layer.reweighs else None
        self.shape = len(heads), len(batch), len(indices), *self.bias.shape[1:]
        self.dropout_mask = None

    def trim(self):
        """Leave out keys before and after those that `key_limits` gives for the queries. Returns a slice of the keys.

        It begins and ends at a multiple of `blocks.ROUND` keys or at the end of the block.
        """
        (keys,), (shift,) = self.kv_ranges, self.stack.kv_shifts
        first, last = (self.view_of(x, self.queries, self.stack.shift) for x in self.tiles.key_limits)
        ahead = shift * torch.arange(self.indices.start, self.indices.stop, device=first.device)
        start = (first.amin((0, 1, 3, 4)) - ahead).min().item() - keys.start  # from the first key on
        stop = (last.amax((0, 1, 3, 4)) - ahead).max().item() - keys.start
        start, stop = start // (keys.step * ROUND), -(-stop // (keys.step * ROUND))
        columns = slice(max(0, start) * ROUND, max(0, stop) * ROUND)
        self.kv_ranges = (keys[columns],)
        return columns

    def view_of(self, x, positions, shift):
        """The view (h, b, s, n, E) of x (H, B, T, E) at this tile's heads, examples and positions.

        positions: those in the first block of the stack; those of each next block lie `shift` later.
        """
        heads, (_, B, T, E) = self.heads if x.size(0) > 1 else range(1), x.shape
        start = (heads.start * B + self.batch.start) * T + positions.start + self.indices.start * shift
        size = len(heads), len(self.batch), len(self.indices), len(positions), E
        return x.as_strided(size, (B * T * E, T * E, shift * E, positions.step * E, 1), x.storage_offset() + start * E)

    def keys_of(self, x):
        """A list of views of x at the keys, one for each of the block's key ranges."""
        return [self.view_of(x, keys, shift) for keys, shift in zip(self.kv_ranges, self.stack.kv_shifts)]

    def gather(self, x, positions):
        """A copy of x at the queries, (h b s, n, E). Each product would copy a strided operand again."""
        return self.view_of(x, positions, self.stack.shift).flatten(0, 2).contiguous()

    def gather_keys(self, x):
        """A copy of x at the keys, (h b s, m, E)."""
        views = self.keys_of(x)
        return (views[0] if len(views) == 1 else torch.cat(views, 3)).flatten(0, 2).contiguous()

    def put(self, x, positions, y):
        """Write y (h b s, n, E) to x at the queries."""
        view = self.view_of(x, positions, self.stack.shift)
        view.copy_(y.view(view.shape))

    def scatter_add(self, x, y):
        """Add y (h b s, m, E) to x at the keys.

        No operation adds to one element twice. If all blocks have the same keys, their sum is added; if the keys of
        neighbouring blocks overlap, they are added in turns no longer than the shift between blocks.
        """
        start, y = 0, y.to(x.dtype)  # adding a tensor of another dtype takes twice as long
        for keys, shift in zip(self.kv_ranges, self.stack.kv_shifts):
            if len(self.indices) > 1 and not shift:
                view = self.view_of(x, keys, 0)[:, :, 0]
                part = y[:, start : start + len(keys)].reshape(*self.shape[:3], len(keys), -1)
                view.add_(part.sum(2))
                start += len(keys)
                continue
            turn = shift // keys.step if len(self.indices) > 1 and shift % keys.step == 0 else len(keys)
            for piece in pieces(keys, turn):
                view = self.view_of(x, piece, shift)
                view.add_(y[:, start : start + len(piece)].view(view.shape))
                start += len(piece)

    def scores(self, queries, keys):
        """queries keys^T / sqrt(D) + bias, (h b s, n, m)."""
        bias = self.bias[:, None, None].expand(self.shape).flatten(0, 2)
        if self.tiles.decay is not None:
            bias = (bias + self.decay).to(bias.dtype)
        s = torch.baddbmm(bias, queries, keys.mT, alpha=queries.size(-1) ** -0.5)
        if self.tiles.padding is not None:
            s.view(self.shape).add_(torch.cat(self.keys_of(self.tiles.padding), 3).mT)
        if self.apart is not None:
            s.view(self.shape).masked_fill_(self.apart, mask_value(s.dtype))
        return s

    @cached_property
    def decay(self):
        """The sum of gates between each query and key, (h b s, n, m)."""
        queries, keys = self.gather(self.tiles.decay, self.queries), self.gather_keys(self.tiles.decay)
        return decay_between(queries[..., 0], keys[..., 0], self.tiles.layer.causal)

    @cached_property
    def apart(self):
        """Which pairs belong to two documents, (1, b, s, n, m); None if this tile lies in one document of each text."""
        if self.tiles.documents is None:
            return None
        queries = self.view_of(self.tiles.documents, self.queries, self.stack.shift)
        keys = torch.cat(self.keys_of(self.tiles.documents), 3)
        both = torch.cat([queries, keys], 3)
        return None if (both.amin(3) == both.amax(3)).all() else queries != keys.mT

    def without_empty_rows(self, p, largest):
        """Softmax weights p with 0 in rows without a kept key. largest: scores whose maximum is that of each row."""
        if not self.tiles.may_be_empty:
            return p
        return p.masked_fill_(largest.amax(-1, keepdim=True) < mask_value(largest.dtype) / 2, 0)

    def reweigh(self, p):
        """The layer's `reweigh` of this tile's rows p (h b s, n, m)."""
        if not self.tiles.layer.reweighs:
            return p
        kept = self.kept[:, None, None]
        if self.apart is not None:
            kept = kept.masked_fill(self.apart, 0)  # (h, b, s, n, m)
        if self.tiles.padding is None:
            keys = kept.sum(-1)
        else:
            real = (torch.cat(self.keys_of(self.tiles.padding), 3) == 0).to(kept.dtype)[0, ..., 0]  # (b, s, m)
            keys = torch.einsum("hbsnm,bsm->hbsn", kept, real)
        keys = keys.long()[..., None].expand(*self.shape[:4], 1).reshape(*p.shape[:2], 1)
        variation = self.tiles.variation
        return self.tiles.layer.reweigh(p, keys, None if variation is None else self.gather(variation, self.queries))

    def drop(self, p):
        """Apply this tile's dropout to weights p, or to their gradient."""
        if self.tiles.random is None:
            return p
        if self.dropout_mask is None:
            self.dropout_mask = dropout_mask(p, self.tiles.dropout, self.tiles.random)
        return p * self.dropout_mask

    def add_bias_gradient(self, ds):
        """Accumulate the gradient of the bias from that of the scores, ds (h b s, n, m)."""
        if self.bias_gradient is not None:
            h = self.bias_gradient.size(0)
            ds = ds.view(self.shape).flatten(1, 2) if h > 1 else ds.view(1, -1, *ds.shape[1:])
            self.bias_gradient.add_(ds.sum(1))

    def add_decay_gradient(self, gradient, ds):
        """Add the gradient of the sums of gates, a `gradient` (H, B, T, 1) or None, from that of the scores."""
        if gradient is None:
            return
        ds = ds.to(gradient.dtype)
        if not self.tiles.layer.causal:
            queries, keys = self.gather(self.tiles.decay, self.queries), self.gather_keys(self.tiles.decay)
            ds = ds * (keys.mT - queries).sign()
        rows = self.view_of(gradient, self.queries, self.stack.shift)
        rows.add_(ds.sum(2).view(rows.shape))
        self.scatter_add(gradient, -ds.sum(1)[..., None])
