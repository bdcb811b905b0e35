"""The engine: attention by a mechanism's plan, block by block, forward and backward, in O(T) memory.

A mechanism never needs this file: it states its bias and its plan (`attention.py`), and the
engine multiplies what the plan names, a tile of scores at a time, adds the bias, takes the
softmax, and computes all of it again in the backward pass instead of keeping it.

Letters: B batch, T time, H heads, D head size; a tile holds h heads, b examples, n queries, m keys.
"""

import math
from typing import NamedTuple, Union

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

    heads: a range of neighbouring heads; queries, keys: a range or a LongTensor of positions.
    """

    heads: range
    queries: Union[range, torch.Tensor]
    keys: Union[range, torch.Tensor]

    def to(self, device):
        return self._replace(**{name: x.to(device) for name, x in self._asdict().items() if isinstance(x, torch.Tensor)})


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


def engine(layer, q, k, v, lengths=None, dropout=0.0, reweigh=None):
    """Attention by `layer`'s bias and plan; equals `layer.weights(q, k) @ v`.

    q, k, v: (B, H, T, D). lengths: (B,) or None. reweigh: what the mechanism does to complete rows
    of weights, or None. First derivatives only. Raises ValueError where reweigh meets a plan of
    several parts, none of which holds complete rows.
    """
    parts, (B, H) = layer.plan(q.size(2)), q.shape[:2]
    if reweigh and len(parts) > 1:
        raise ValueError(f"reweigh needs complete rows, a plan of one part; this plan has {len(parts)}")
    first = torch.zeros(1, dtype=torch.long, device=q.device)
    if layer.bias(first, first).size(0) == 1 and all(len(block.heads) == H for part in parts for block in part):
        # Heads that share everything are only more examples: no copy into another order.
        parts = [[block._replace(heads=range(1)) for block in part] for part in parts]
        lengths = lengths.repeat_interleave(H) if lengths is not None else None
        q, k, v = (x.contiguous().view(1, B * H, *x.shape[2:]) for x in (q, k, v))
    else:
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    seed = int(torch.randint(2**62, ())) if dropout else 0  # of the global stream: resume repeats it
    parameters = [p for p in layer.mask_parameters() if p.requires_grad]
    y = Engine.apply(layer, parts, reweigh, dropout, seed, lengths, q, k, v, *parameters)
    return y.view(B, H, *y.shape[2:]) if y.size(1) == B * H else y.transpose(0, 1)


class Engine(torch.autograd.Function):
    """Here q, k, v are (H, B, T, D); a tile takes (h b, n, D) and (h b, m, D) out of them."""

    @staticmethod
    def forward(ctx, layer, parts, reweigh, dropout, seed, lengths, q, k, v, *parameters):
        walk = Walk(layer, parts, dropout, seed, lengths, q)
        out = torch.zeros_like(v, dtype=wide(v)) if walk.joined else torch.empty_like(v)
        lse = out.new_full((*q.shape[:3], 1), -math.inf) if walk.joined else None
        for tile in walk:
            s, values = tile.scores(tile.take(q, tile.queries), tile.take(k, tile.keys)), tile.take(v, tile.keys)
            if not walk.joined:
                p = torch.softmax(s, -1, out=s)
                tile.put_product(out, tile.queries, tile.drop(reweigh(p) if reweigh else p), values)
                continue
            # A query's other keys stand in other parts: weigh what was there against what came.
            here = s.to(lse.dtype).logsumexp(-1, keepdim=True)
            y = torch.bmm(tile.drop((s - here).exp().to(s.dtype)), values)
            before = tile.take(lse, tile.queries)
            total = torch.logaddexp(before, here)
            y = tile.take(out, tile.queries) * (before - total).exp() + y * (here - total).exp()
            tile.put(out, tile.queries, y)
            tile.put(lse, tile.queries, total)
        out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, lengths, lse, out if walk.joined else None, *parameters)
        ctx.layer, ctx.reweigh, ctx.how = layer, reweigh, (parts, dropout, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, lengths, lse, out, *parameters = ctx.saved_tensors
        grad, scale = grad.contiguous(), q.size(-1) ** -0.5
        walk = Walk(ctx.layer, *ctx.how, lengths, q, parameters)
        dq, dk, dv = (torch.zeros_like if walk.joined else torch.empty_like)(q), torch.zeros_like(k), torch.zeros_like(v)
        if walk.joined:  # sum of p dp over a whole row, which no tile sees
            delta = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)
        for tile in walk:
            queries, keys, g = tile.take(q, tile.queries), tile.take(k, tile.keys), tile.take(grad, tile.queries)
            s = tile.scores(queries, keys)
            if walk.joined:
                p = (s - tile.take(lse, tile.queries)).exp().to(s.dtype)
            else:
                p = torch.softmax(s, -1, out=s)
            used, dp = p, tile.drop(torch.bmm(g, tile.take(v, tile.keys).mT))
            if ctx.reweigh:
                with torch.enable_grad():
                    used = ctx.reweigh(p.requires_grad_())
                (dp,) = torch.autograd.grad(used, p, dp)
                p, used = p.detach(), used.detach()
            tile.put_product(dv, tile.keys, tile.drop(used).mT, g, add=True)
            if walk.joined:
                ds = (dp - tile.take(delta, tile.queries)).to(p.dtype) * p
            else:
                ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            tile.put_product(dq, tile.queries, ds, keys, scale, add=walk.joined)
            tile.put_product(dk, tile.keys, ds.mT, queries, scale, add=True)
            tile.add_bias_gradient(ds)
        walk.finish()
        return None, None, None, None, None, None, dq, dk, dv, *walk.gradients


def wide(x):
    """The precision for sums over what x holds: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def places(x, positions):
    """x (b, T, E) at some positions: of a range a view, of a LongTensor a copy."""
    return x[:, positions.start : positions.stop : positions.step] if isinstance(positions, range) else x[:, positions]


class Walk:
    """The tiles of a plan in order, each with its slice of a bias and its dropout."""

    def __init__(self, layer, parts, dropout, seed, lengths, q, parameters=()):
        self.layer, self.q, self.parameters, self.dropout = layer, q, parameters, dropout
        self.joined, self.blocks = len(parts) > 1, [block.to(q.device) for part in parts for block in part]
        self.padding = None
        if lengths is not None:
            padded = torch.arange(q.size(2), device=q.device) >= lengths[:, None]
            self.padding = q.new_zeros(padded.shape).masked_fill_(padded, FLOOR)[..., None]  # (B, T, 1)
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self.random = torch.Generator(q.device).manual_seed(seed) if dropout else None
        extents = {}  # of the offsets of keys from queries: one strip holds those of all its blocks
        for block in filter(self.shares, self.blocks):
            key, first = self.geometry(block)
            n, low, high = extents.get(key, (0, first, first))
            last = first + len(block.keys) * block.keys.step
            extents[key] = max(n, len(block.queries)), min(low, first), max(high, last)
        self.strips = {
            key: Strip(self, key[0], range(0, n * key[1], key[1]), range(low, high, key[2]))
            for key, (n, low, high) in extents.items()
        }

    def shares(self, block):
        return self.layer.relative and isinstance(block.queries, range) and isinstance(block.keys, range)

    @staticmethod
    def geometry(block):
        """(what blocks of one strip have in common, the first key's offset from the first query)."""
        first = block.keys.start - block.queries.start
        return (block.heads, block.queries.step, block.keys.step, first % block.keys.step), first

    def __iter__(self):
        H, B = self.q.shape[:2]
        for block in self.blocks:
            heads, queries, keys = block
            if self.shares(block):
                key, first = self.geometry(block)
                strip = self.strips[key]
                start = (first - strip.low) // keys.step
                where = slice(len(queries)), slice(start, start + len(keys))
            else:
                strip, where = Strip(self, heads, queries, keys), (slice(None), slice(None))
            rows = max(1, (TILE if self.q.device.type == "cpu" else 128 * TILE) // (len(queries) * len(keys)))
            n_heads, n_batch = (rows // B, B) if rows >= B else (1, rows)
            for h in range(heads.start, heads.stop, n_heads):
                for b in range(0, B, n_batch):
                    hs, bs = slice(h, min(h + n_heads, heads.stop)), slice(b, min(b + n_batch, B))
                    yield Tile(self, strip, where, hs, bs, queries, keys)
            if not self.shares(block):
                strip.finish()

    def finish(self):
        """Complete `gradients`, those of `parameters`, after the last tile."""
        for strip in self.strips.values():
            strip.finish()


class Strip:
    """A bias at some positions, in the engine's precision, and the gradient its tiles add up."""

    def __init__(self, walk, heads, i, j):
        self.walk, self.first_head, self.low = walk, heads.start, j[0]
        i, j = (torch.as_tensor(x, device=walk.q.device) for x in (i, j))
        with torch.set_grad_enabled(len(walk.parameters) > 0):
            self.live = walk.layer.bias(i, j)
            if self.live.size(0) > 1:
                self.live = self.live[heads.start : heads.stop]
        self.value = self.live.detach().clamp(min=FLOOR).to(walk.q.dtype)
        self.gradient = torch.zeros_like(self.value, dtype=wide(self.value)) if walk.parameters else None

    def finish(self):
        if self.gradient is None or not self.live.requires_grad:
            return
        found = torch.autograd.grad(self.live, self.walk.parameters, self.gradient.to(self.live.dtype), allow_unused=True)
        for total, part in zip(self.walk.gradients, found):
            if part is not None:
                total += part


class Tile:
    """Some heads (slice) and examples (slice) of a block: what is multiplied in one piece."""

    def __init__(self, walk, strip, where, heads, batch, queries, keys):
        self.walk, self.heads, self.batch, self.queries, self.keys = walk, heads, batch, queries, keys
        self.dropout_mask = None
        own = slice(None)
        if strip.value.size(0) > 1:
            own = slice(heads.start - strip.first_head, heads.stop - strip.first_head)
        self.bias = strip.value[(own, *where)]
        self.bias_gradient = strip.gradient[(own, *where)] if strip.gradient is not None else None
        self.shape = heads.stop - heads.start, batch.stop - batch.start, len(queries), len(keys)

    def at(self, x, positions):
        """x (H, B, T, E) at this tile's heads and examples and at `positions`: (h b, n, E), of a
        range a view."""
        return places(x[self.heads, self.batch].flatten(0, 1), positions)

    def take(self, x, positions):
        """`at`, contiguous: a product would copy a strided operand each time it is used."""
        return self.at(x, positions).contiguous()

    def put(self, x, positions, y):
        """Write y (h b, n, E) at the places of `at`."""
        if isinstance(positions, range):
            self.at(x, positions).copy_(y)
        else:
            x[self.heads, self.batch].flatten(0, 1).index_copy_(1, positions, y.to(x.dtype))

    def put_product(self, x, positions, a, b, scale=1.0, add=False):
        """Write scale * a @ b at the places of `at`, or add it to what is there."""
        if isinstance(positions, range):
            self.at(x, positions).baddbmm_(a, b, alpha=scale, beta=float(add))
        elif add:
            x[self.heads, self.batch].flatten(0, 1).index_add_(1, positions, torch.bmm(a, b), alpha=scale)
        else:
            self.put(x, positions, scale * torch.bmm(a, b))

    def scores(self, queries, keys):
        """queries keys^T / sqrt(D) + bias, (h b, n, m)."""
        h, b, n, m = self.shape
        bias = self.bias[:, None].expand(h, b, n, m).reshape(h * b, n, m)
        s = torch.baddbmm(bias, queries, keys.mT, alpha=queries.size(-1) ** -0.5)
        if self.walk.padding is not None:
            s.view(self.shape).add_(places(self.walk.padding[self.batch], self.keys).mT)
        return s

    def drop(self, p):
        """Dropout of weights p, or of their gradient. Walks of one seed draw the same masks."""
        if self.walk.random is None:
            return p
        if self.dropout_mask is None:
            self.dropout_mask = dropout_mask(p, self.walk.dropout, self.walk.random)
        return p * self.dropout_mask

    def add_bias_gradient(self, ds):
        if self.bias_gradient is not None:
            h = self.bias_gradient.size(0)
            total = ds.view(self.shape).sum(1, dtype=self.bias_gradient.dtype)
            self.bias_gradient.add_(total if h > 1 else total.sum(0, keepdim=True))
