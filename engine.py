"""The engine: attention by a mechanism's plan, block by block, forward and backward, in O(T) memory.

A mechanism never needs this file: it states its bias and its plan (`attention.py`), and the
engine multiplies what the plan names, a tile of scores at a time, adds the bias, takes the
softmax, and computes all of it again in the backward pass instead of keeping it.

Letters: B batch, T time, H heads, D head size, S blocks of one shape in a stack; a tile holds h
heads, b examples and s blocks of n queries and m keys.
"""

import math
from functools import cached_property
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Stands for -inf inside the engine: exp() of it is exactly 0 in every precision, a row of
# nothing else stays finite, and on CPUs exp(-inf) takes two to three times as long.
FLOOR = -1e4

# Elements of one tile of scores in the engine: of bfloat16 on a CPU some fit the shared cache, and
# fewer are slower, since every operation costs microseconds to start.
TILE = 2**21


class Block(NamedTuple):
    """Every pair of `queries` x `keys`, multiplied densely for each of `heads`.

    heads: a range of neighbouring heads. queries: a range of positions. keys: a range, or a tuple
    of ranges that share no position. distances: the range of |i - j| that the block answers for,
    where another part of the plan answers for the rest; None: all.
    """

    heads: range
    queries: range
    keys: Union[range, tuple]
    distances: Optional[range] = None

    @property
    def runs(self):
        """`keys` as a tuple of ranges, none of them empty."""
        return tuple(run for run in (self.keys if isinstance(self.keys, tuple) else (self.keys,)) if run)

    @property
    def pairs(self):
        return len(self.heads) * len(self.queries) * sum(map(len, self.runs))

    def geometry(self):
        """What blocks have in common that differ by a shift alone."""
        first = self.queries.start
        runs = tuple((run.start - first, len(run), run.step) for run in self.runs)
        return self.heads, len(self.queries), self.queries.step, runs, self.distances


class Stack(NamedTuple):
    """`count` blocks, the first of them `block`, each `shift` positions after the one before."""

    block: Block
    count: int
    shift: int


def stacks(blocks, period):
    """The blocks in order, neighbours of one geometry as one stack, where the layer's bias is the
    same for all of them: they are a multiple of its `period` apart."""
    found, before = [], None
    for block in blocks:
        geometry = block.geometry() if period else None
        if geometry and geometry == before:
            first, count, shift = found[-1]
            ahead = block.queries.start - first.queries.start
            shift = shift or ahead
            # keys of different residues must not meet: `Tile.add` takes turns only where they are of one
            apart = all(shift % run.step == 0 or ahead < run.step for run in block.runs)
            if ahead == count * shift > 0 == shift % period and apart:
                found[-1] = Stack(first, count + 1, shift)
                continue
        found.append(Stack(block, 1, 0))
        before = geometry
    return found


def dropout_mask(x, p, generator=None):
    """0 with probability p, else 1 / (1 - p), in the shape and type of x.

    From 16 random bits an element: PyTorch draws 32, one at a time, which on a CPU takes several
    times as long as the attention it is for.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=generator)
    dropped = round(p * 2**16)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def drop(x, p):
    """x with elements dropped at rate p."""
    if p == 0:
        return x
    return x * dropout_mask(x, p) if x.device.type == "cpu" else F.dropout(x, p)


def folded(layer, q, lengths, *others):
    """(plan, lengths, q, *others) in the engine's order, (H, B, T, E) and contiguous.

    Heads that share everything become more examples, (1, B H, T, E): no copy into another order.
    """
    parts, (B, H) = layer.plan(q.size(2)), q.shape[:2]
    first = torch.zeros(1, dtype=torch.long, device=q.device)
    if layer.bias(first, first).size(0) == 1 and all(len(block.heads) == H for part in parts for block in part):
        parts = [[block._replace(heads=range(1)) for block in part] for part in parts]
        lengths = lengths.repeat_interleave(H) if lengths is not None else None
        moved = [x.contiguous().view(1, B * H, *x.shape[2:]) for x in (q, *others)]
    else:
        moved = [x.transpose(0, 1).contiguous() for x in (q, *others)]
    return parts, lengths, *moved


def unfolded(x, B, H):
    """`folded`, back to (B, H, T, E)."""
    return x.view(B, H, *x.shape[2:]) if x.size(1) == B * H else x.transpose(0, 1)


def engine(layer, q, k, v, lengths=None, dropout=0.0, statistic=None):
    """Attention by `layer`'s bias and plan; equals `layer.weights(q, k) @ v`.

    q, k, v: (B, H, T, D). lengths: (B,) or None. statistic: (B, H, T, 1), what `layer.reweigh` is
    to know of each row, or None. First derivatives only. Raises ValueError where the layer
    reweighs and its plan has several parts, none of which holds complete rows.
    """
    B, H = q.shape[:2]
    extra = [] if statistic is None else [statistic]
    parts, lengths, q, k, v, *extra = folded(layer, q, lengths, k, v, *extra)
    if layer.reweighs and len(parts) > 1:
        raise ValueError(f"reweigh needs complete rows, a plan of one part; this plan has {len(parts)}")
    seed = int(torch.randint(2**62, ())) if dropout else 0  # of the global stream: resume repeats it
    parameters = [p for p in layer.mask_parameters() if p.requires_grad]
    found = []
    for n, part in enumerate(parts):
        how = stacks(part, layer.bias_period), lengths, dropout, seed + n, extra[0] if extra else None, len(parts) > 1
        found.append(Engine.apply(layer, how, q, k, v, *parameters))
    y, lse = found[0]
    for other, its in found[1:]:  # softmax over all keys: a part weighs as much as the sum of its exponentials
        y, lse = torch.lerp(y, other, torch.sigmoid(its - lse).to(y.dtype)), torch.logaddexp(lse, its)
    return unfolded(y, B, H)


@torch.no_grad()
def row_squares(layer, q, k, lengths=None):
    """The sum of squares of each query's softmax weights, (B, H, T, 1), before `reweigh`: for a
    mechanism's `statistic`. The plan must have one part."""
    B, H = q.shape[:2]
    (part,), lengths, q, k = folded(layer, q, lengths, k)
    squares = q.new_empty(*q.shape[:3], 1, dtype=wide(q))
    for tile in Walk(layer, stacks(part, layer.bias_period), lengths, q=q).tiles():
        p = torch.softmax(tile.scores(tile.take(q, tile.queries), tile.take(k, *tile.keys)), -1, dtype=squares.dtype)
        tile.put(squares, tile.queries, p.square_().sum(-1, keepdim=True))
    return unfolded(squares, B, H)


class Engine(torch.autograd.Function):
    """One part of a plan: its output (H, B, T, D) and, where it is to be joined with others, the
    logarithm of each row's sum of exponentials (H, B, T, 1)."""

    @staticmethod
    def forward(ctx, layer, how, q, k, v, *parameters):
        walk = Walk(layer, *how, q)
        out = torch.zeros_like(v) if walk.joined else torch.empty_like(v)
        lse = v.new_full((*v.shape[:3], 1), -math.inf, dtype=wide(v)) if walk.joined else None
        for tile in walk.tiles():
            s = tile.scores(tile.take(q, tile.queries), tile.take(k, *tile.keys))
            largest = s.amax(-1, keepdim=True).to(lse.dtype) if walk.joined else None
            p = torch.softmax(s, -1, out=s)
            if walk.joined:  # whose weight is exp(largest - lse)
                tile.put(lse, tile.queries, largest - p.amax(-1, keepdim=True).to(lse.dtype).log_())
            tile.put(out, tile.queries, torch.bmm(tile.drop(tile.reweigh(p)), tile.take(v, *tile.keys)))
        ctx.save_for_backward(q, k, v, *parameters)
        ctx.layer, ctx.how = layer, how
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        q, k, v, *parameters = ctx.saved_tensors
        walk, grad, scale = Walk(ctx.layer, *ctx.how, q, parameters), grad.contiguous(), q.size(-1) ** -0.5
        dq = (torch.zeros_like if walk.joined else torch.empty_like)(q)
        dk, dv = (torch.zeros_like(x, dtype=wide(x)) for x in (k, v))  # sums over many blocks
        for tile in walk.tiles():
            queries, keys, g = tile.take(q, tile.queries), tile.take(k, *tile.keys), tile.take(grad, tile.queries)
            s = tile.scores(queries, keys)
            p = torch.softmax(s, -1, out=s)
            used, dp = p, tile.drop(torch.bmm(g, tile.take(v, *tile.keys).mT))
            if walk.layer.rescales:  # p f / sum(p f) is softmax(s + log f)
                p = used = tile.reweigh(p)
            elif walk.layer.reweighs:
                with torch.enable_grad():
                    used = tile.reweigh(p.requires_grad_())
                (dp,) = torch.autograd.grad(used, p, dp)
                p, used = p.detach(), used.detach()
            tile.add(dv, tile.keys, torch.bmm(tile.drop(used).mT, g))
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            if walk.joined:
                ds.addcmul_(p, tile.take(grad_lse, tile.queries).to(p.dtype))
            tile.put(dq, tile.queries, product(ds, keys, scale))
            tile.add(dk, tile.keys, product(ds.mT, queries, scale))
            tile.add_bias_gradient(ds)
        return None, None, dq, dk.to(k.dtype), dv.to(v.dtype), *walk.gradients


def wide(x):
    """The precision for sums over what x holds: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def product(a, b, scale):
    """scale * a @ b for batches of matrices."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


class Walk:
    """The tiles of one part of a plan in order, with what all of them need.

    Walks of one seed draw the same dropout. After the last tile `gradients` are those of
    `parameters`, on which the bias depends.
    """

    def __init__(self, layer, stacks, lengths=None, dropout=0.0, seed=0, statistic=None, joined=False, q=None, parameters=()):
        self.layer, self.stacks, self.statistic, self.joined = layer, stacks, statistic, joined
        self.q, self.parameters, self.dropout = q, parameters, dropout
        self.random = torch.Generator(q.device).manual_seed(seed) if dropout else None
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self.padding = None
        if lengths is not None:
            padded = torch.arange(q.size(2), device=q.device) >= lengths[:, None]
            self.padding = q.new_zeros(padded.shape).masked_fill_(padded, FLOOR)[None, ..., None]  # (1, B, T, 1)

    def tiles(self):
        H, B, T = self.q.shape[:3]
        # a bias of i - j alone: one row of it, with the offsets of keys from 1 - T to T - 1
        row = Bias(self, range(T - 1, T), [range(2 * T - 1)]) if self.layer.relative else None
        # the largest first: the smaller ones then find room in what these leave, where growing ones would never
        for stack in sorted(self.stacks, key=lambda stack: -stack.block.pairs):
            block = stack.block
            bias = Spread(row, block, T) if row else Bias(self, block.queries, block.runs, block)
            room = TILE if self.q.device.type == "cpu" else 128 * TILE
            room = max(1, room // (len(block.queries) * sum(map(len, block.runs))))
            n_blocks = min(room, stack.count)
            n_batch = min(room // n_blocks, B)
            n_heads = room // (n_blocks * n_batch)
            for heads in pieces(block.heads, n_heads):
                for batch in pieces(range(B), n_batch):
                    for blocks in pieces(range(stack.count), n_blocks):
                        yield Tile(self, stack, bias, heads, batch, blocks)
            bias.finish()
        if row:
            row.finish()


def pieces(whole, size):
    """A range in ranges of at most `size`."""
    return (whole[a : a + size] for a in range(0, len(whole), size))


class Strip:
    """A bias at some queries and keys, (h or 1, n, m): `value` in the engine's precision, and the
    `gradient` that its tiles add up, or None."""

    @cached_property
    def kept(self):
        """1.0 where a pair is kept, else 0.0."""
        return (self.value > FLOOR / 2).to(wide(self.value))


class Bias(Strip):
    """What the layer says the bias is, at any queries and keys."""

    def __init__(self, walk, queries, runs, block=None):
        self.walk, device = walk, walk.q.device
        i, *j = (torch.arange(x.start, x.stop, x.step, device=device) for x in (queries, *runs))
        j = torch.cat(j)
        with torch.set_grad_enabled(len(walk.parameters) > 0):
            self.live = walk.layer.bias(i, j)
            if block and self.live.size(0) > 1:
                self.live = self.live[block.heads.start : block.heads.stop]
        value = self.live.detach().clamp(min=FLOOR).to(walk.q.dtype)
        self.value = answered(value, (j - i[:, None]).abs(), block.distances) if block else value
        self.gradient = torch.zeros_like(self.value, dtype=wide(self.value)) if self.live.requires_grad else None

    def finish(self):
        """Carry `gradient` on to the parameters."""
        if self.gradient is None:
            return
        found = torch.autograd.grad(self.live, self.walk.parameters, self.gradient.to(self.live.dtype), allow_unused=True)
        for total, part in zip(self.walk.gradients, found):
            if part is not None:
                total += part


def answered(value, distance, distances):
    """`value` where the distance is one that a block answers for, else the floor."""
    if distances is None:
        return value
    return value.masked_fill((distance < distances.start) | (distance >= distances.stop), FLOOR)


class Spread(Strip):
    """A `Bias` of one row with all offsets, spread over the pairs of a block."""

    def __init__(self, row, block, T):
        self.row, self.block, self.T = row, block, T
        self.heads = slice(block.heads.start, block.heads.stop) if row.value.size(0) > 1 else slice(None)
        offsets = torch.arange(1 - T, T, device=row.value.device)
        self.value = self.spread(answered(row.value[self.heads, 0], offsets.abs(), block.distances))
        self.gradient = torch.zeros_like(self.value, dtype=row.gradient.dtype) if row.gradient is not None else None

    def spread(self, x):
        """x (h, 2 T - 1) by offset -> (h, n, m), each pair's own."""
        queries, n = self.block.queries, len(self.block.queries)
        parts = []
        for run in self.block.runs:  # from the last query up, since strides cannot be negative
            first = run.start - queries[-1] + self.T - 1
            size, stride = (x.size(0), n, len(run)), (x.stride(0), queries.step, run.step)
            parts.append(x.as_strided(size, stride, x.storage_offset() + first))
        return torch.cat(parts, 2).flip(1)

    def finish(self):
        if self.gradient is not None:
            where = self.spread(torch.arange(2 * self.T - 1, device=self.value.device)[None])
            self.row.gradient[self.heads, 0].index_add_(1, where.flatten(), self.gradient.flatten(1))


class Tile:
    """Some heads, examples and blocks (ranges) of a stack: what is multiplied in one piece."""

    def __init__(self, walk, stack, bias, heads, batch, blocks):
        self.walk, self.stack, self.heads, self.batch, self.blocks = walk, stack, heads, batch, blocks
        self.queries, self.keys = stack.block.queries, stack.block.runs
        first = heads.start - stack.block.heads.start
        own = slice(first, first + len(heads)) if bias.value.size(0) > 1 else slice(None)
        self.bias = bias.value[own]
        self.bias_gradient = bias.gradient[own] if bias.gradient is not None else None
        self.kept = bias.kept[own] if walk.layer.reweighs else None
        self.shape = len(heads), len(batch), len(blocks), *self.bias.shape[1:]
        self.dropout_mask = None

    def at(self, x, run):
        """The view of x (H, B, T, E) at this tile's heads and examples and, in each of its blocks, at
        the positions `run` (as in the first block): (h, b, s, n, E)."""
        heads, (_, B, T, E) = self.heads if x.size(0) > 1 else range(1), x.shape
        start = (heads.start * B + self.batch.start) * T + run.start + self.blocks.start * self.stack.shift
        size = len(heads), len(self.batch), len(self.blocks), len(run), E
        return x.as_strided(size, (B * T * E, T * E, self.stack.shift * E, run.step * E, 1), x.storage_offset() + start * E)

    def take(self, x, *runs):
        """`at`, copied: (h b s, n, E). A product would copy a strided operand each time it is used."""
        views = [self.at(x, run) for run in runs]
        return (views[0] if len(views) == 1 else torch.cat(views, 3)).flatten(0, 2).contiguous()

    def put(self, x, run, y):
        """Write y (h b s, n, E) at the places of `at`."""
        view = self.at(x, run)
        view.copy_(y.view(view.shape))

    def add(self, x, runs, y):
        """Add y (h b s, m, E) to the places of `at`. Blocks of a stack may share keys: then in turns,
        each as long as the way from one block to the next."""
        start, shift, y = 0, self.stack.shift, y.to(x.dtype)  # adding what is of another type takes twice as long
        for run in runs:
            turn = shift // run.step if len(self.blocks) > 1 and shift % run.step == 0 else len(run)
            for some in pieces(run, turn):
                view = self.at(x, some)
                view.add_(y[:, start : start + len(some)].view(view.shape))
                start += len(some)

    def scores(self, queries, keys):
        """queries keys^T / sqrt(D) + bias, (h b s, n, m)."""
        bias = self.bias[:, None, None].expand(self.shape).flatten(0, 2)
        s = torch.baddbmm(bias, queries, keys.mT, alpha=queries.size(-1) ** -0.5)
        if self.walk.padding is not None:
            s.view(self.shape).add_(self.padding().mT)
        return s

    def padding(self):
        """0 for keys that are there, the floor for padding: (1, b, s, m, 1)."""
        return torch.cat([self.at(self.walk.padding, run) for run in self.keys], 3)

    def reweigh(self, p):
        """The layer's `reweigh` of this tile's rows, told how many keys each of them sees."""
        if not self.walk.layer.reweighs:
            return p
        if self.walk.padding is None:
            keys = self.kept.sum(-1)[:, None, None]
        else:
            there = (self.padding() == 0).to(self.kept.dtype)[0, ..., 0]
            keys = torch.einsum("hnm,bsm->hbsn", self.kept, there)
        keys = keys.long()[..., None].expand(*self.shape[:4], 1).reshape(*p.shape[:2], 1)
        if self.walk.statistic is None:
            return self.walk.layer.reweigh(p, keys)
        return self.walk.layer.reweigh(p, keys, self.take(self.walk.statistic, self.queries))

    def drop(self, p):
        """Dropout of weights p, or of their gradient."""
        if self.walk.random is None:
            return p
        if self.dropout_mask is None:
            self.dropout_mask = dropout_mask(p, self.walk.dropout, self.walk.random)
        return p * self.dropout_mask

    def add_bias_gradient(self, ds):
        if self.bias_gradient is not None:
            h = self.bias_gradient.size(0)
            ds = ds.view(self.shape).flatten(1, 2) if h > 1 else ds.view(1, -1, *ds.shape[1:])
            self.bias_gradient.add_(ds.sum(1))
