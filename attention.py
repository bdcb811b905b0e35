"""Attention, stated once and computed twice: a slow reference and a fast engine.

A mechanism is a subclass named `Attention` in a file of its own that overrides at most

    bias(i, j)   the mask in log space: 0 keeps a pair, -inf drops it, between is soft
    plan(T)      where the bias is not -inf, as blocks to be multiplied densely
    reweigh(p)   what happens to a complete row of softmax weights

The class here is the dense mechanism and derives everything else from these three:
`weights` is the reference, `attend` the engine, `forward` the layer with its cache.

Letters: B batch, T time, C channels, H heads, D head size, S span (keys a query may see).
n and m count the queries and the keys of one block.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Stands for -inf inside the engine: exp() of it is exactly 0 in every precision, a row of
# nothing else stays finite, and on CPUs exp(-inf) takes two to three times as long.
FLOOR = -1e4

# Elements of one tile of scores in the engine: of bfloat16 on a CPU some fit the shared cache, and
# fewer are slower, since every operation costs microseconds to start.
TILE = 2**21

KERNELS = ("auto", "engine", "sdpa", "reference")


class Block(NamedTuple):
    """Every pair of `queries` x `keys`, multiplied densely for each of `heads`.

    heads: a range of neighbouring heads; queries, keys: a range or a LongTensor of positions.
    """

    heads: range
    queries: Union[range, torch.Tensor]
    keys: Union[range, torch.Tensor]


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2), dense.

    Causal: a query sees itself and the `block_size - 1` positions before it, so a text of any
    length has a meaning. Otherwise it sees every position.

    config: `GPTConfig` (n_embd, n_head, block_size, dropout, bias, causal, kernel, options).
    """

    relative = True  # bias depends on i - j only: evaluated once for all blocks of a shape

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
        part = []
        for a in range(0, T, n):
            b = min(a + n, T)
            keys = range(max(0, a - self.reach()), b) if self.causal else range(T)
            part.append(Block(range(self.n_head), range(a, b), keys))
        return [part]

    def reweigh(self, p):
        """What happens to complete rows of softmax weights (..., n, m); here nothing."""
        return p

    def penalty(self):
        """A term of the loss (a scalar tensor), or 0."""
        return 0.0

    def stats(self):
        """Plain numbers for the log and the plots, by name."""
        return {}

    def reach(self):
        """The farthest distance a query can need: how long the cache must be."""
        return self.block_size - 1

    # ---- derived: nothing below is written again by a mechanism ----------------------------

    def mask_parameters(self):
        """The parameters that `bias` depends on: all but the projections'."""
        return [p for name, p in self.named_parameters() if name.split(".")[0] not in ("qkv", "proj")]

    def weights(self, q, k, i=None, j=None, lengths=None):
        """The reference: reweigh(softmax(q k^T / sqrt(D) + bias)), dense, slow, obvious.

        q: (B, H, n, D) at positions i, k: (B, H, m, D) at positions j (default 0, 1, ...).
        lengths: (B,) tokens of each example, the rest is padding; None: no padding.
        Returns (B, H, n, m).
        """
        i = torch.arange(q.size(2), device=q.device) if i is None else i
        j = torch.arange(k.size(2), device=q.device) if j is None else j
        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3)) + self.bias(i, j).to(q.dtype)
        if lengths is not None:
            scores = scores.masked_fill(j >= lengths[:, None, None, None], FLOOR)  # finite: padding may see only padding
        return self.reweigh(torch.softmax(scores, -1, dtype=q.dtype))

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
        return engine(self, q, k, v, lengths, dropout)

    def choose_kernel(self, device):
        """'engine', 'sdpa' or 'reference': the configured one, or by 'auto' the faster for `device`.

        Raises ValueError where PyTorch's fused kernel is asked for and cannot hold the mechanism.
        """
        dense = type(self).bias is Attention.bias and type(self).reweigh is Attention.reweigh
        if self.kernel == "sdpa" and not dense:
            raise ValueError("kernel=sdpa computes dense attention only; use engine or reference")
        if self.kernel == "auto":
            return "sdpa" if dense and torch.device(device).type != "cpu" else "engine"
        return self.kernel

    def forward(self, x, rotation=None, lengths=None, cache=None):
        """x (B, T, C) -> (B, T, C).

        rotation: cosines and sines of the positions' angles (`rotations`), or None.
        lengths: (B,), see `weights`. cache: a `Cache`; x then continues the text it holds.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = split_heads(qkv, rotation)  # (B, H, T, D)
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.extend(k, v)
            with torch.autocast(x.device.type, enabled=False):
                y = self.attend(q, k, v, lengths)
        else:
            i = torch.arange(cache.length, cache.length + T, device=x.device)
            keys, values, j = cache.extend(k, v)
            y = self.weights(q, keys, i, j) @ values
        return drop(self.proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout if self.training else 0.0)

    def pairs(self, T):
        """Query-key pairs per head that the plan multiplies for a text of T tokens."""
        blocks = [block for part in self.plan(T) for block in part]
        return sum(math.prod(map(len, block)) for block in blocks) / self.n_head

    @torch.no_grad()
    def kept(self, T):
        """Query-key pairs per head whose bias is not -inf, for a text of T tokens."""
        total, j = 0, torch.arange(T)
        for i in torch.arange(T).split(256):
            bias = self.bias(i, j)
            total += (bias > -math.inf).sum().item() / bias.size(0)
        return total


# ---- dropout -------------------------------------------------------------------------------


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
        held = min(start, self.size)
        every = [self.k[:, :, :held], self.v[:, :, :held], self.positions[:held]]
        if T > 1:  # together before the ring is written: the first new token may need what the last displaces
            every = [torch.cat([every[0], k], 2), torch.cat([every[1], v], 2), torch.cat([every[2], new])]
        first = max(0, T - self.size)  # of the new ones, the first that stays
        while first < T:
            slot = (start + first) % self.size
            last = min(T, first + self.size - slot)
            self.k[:, :, slot : slot + last - first] = k[:, :, first:last]
            self.v[:, :, slot : slot + last - first] = v[:, :, first:last]
            self.positions[slot : slot + last - first] = new[first:last]
            first = last
        self.length += T
        if T > 1:
            return every
        held = min(self.length, self.size)
        return self.k[:, :, :held], self.v[:, :, :held], self.positions[:held]


# ---- the engine ----------------------------------------------------------------------------


@torch.compiler.disable
def engine(layer, q, k, v, lengths=None, dropout=0.0):
    """Attention by `layer`'s plan, block by block; equals `layer.weights(q, k) @ v`.

    q, k, v: (B, H, T, D); lengths: (B,) or None. O(T) memory: one tile of scores lives at a time
    and is computed again in the backward pass. First derivatives only.
    """
    parts, (B, H) = layer.plan(q.size(2)), q.shape[:2]
    first = torch.zeros(1, dtype=torch.long, device=q.device)
    if layer.bias(first, first).size(0) == 1 and all(len(block.heads) == H for part in parts for block in part):
        # Heads that share everything are only more examples: no copy into another order.
        parts = [[block._replace(heads=range(1)) for block in part] for part in parts]
        lengths = lengths.repeat_interleave(H) if lengths is not None else None
        pack, unpack = (lambda x: x.contiguous().view(1, B * H, *x.shape[2:])), (lambda x: x.view(B, H, *x.shape[2:]))
    else:
        pack, unpack = (lambda x: x.transpose(0, 1).contiguous()), (lambda x: x.transpose(0, 1))
    seed = int(torch.randint(2**62, ())) if dropout else 0  # of the global stream: resume repeats it
    parameters = [p for p in layer.mask_parameters() if p.requires_grad]
    return unpack(Engine.apply(layer, parts, pack(q), pack(k), pack(v), lengths, dropout, seed, *parameters))


class Engine(torch.autograd.Function):
    """Here q, k, v are (H, B, T, D); a tile takes (h b, n, D) and (h b, m, D) out of them."""

    @staticmethod
    def forward(ctx, layer, parts, q, k, v, lengths, dropout, seed, *parameters):
        walk = Walk(layer, parts, q, lengths, dropout, seed)
        out = torch.zeros_like(v, dtype=wide(v)) if walk.joined else torch.empty_like(v)
        lse = out.new_full((*q.shape[:3], 1), -math.inf) if walk.joined else None
        for tile in walk:
            s, values = tile.scores(tile.take(q, tile.queries), tile.take(k, tile.keys)), tile.take(v, tile.keys)
            if not walk.joined:
                p = layer.reweigh(torch.softmax(s, -1, out=s))
                tile.put_product(out, tile.queries, tile.drop(p), values)
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
        ctx.layer, ctx.parts, ctx.dropout, ctx.seed = layer, parts, dropout, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, lengths, lse, out, *parameters = ctx.saved_tensors
        layer, grad, scale = ctx.layer, grad.contiguous(), q.size(-1) ** -0.5
        dq, dk, dv = torch.zeros_like(q) if out is not None else torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        walk = Walk(layer, ctx.parts, q, lengths, ctx.dropout, ctx.seed, parameters)
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
            if walk.reweighs:
                with torch.enable_grad():
                    used = layer.reweigh(p.requires_grad_())
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
        return None, None, dq, dk, dv, None, None, None, *walk.gradients


def wide(x):
    """The precision for sums over what x holds: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


class Walk:
    """The tiles of a plan in order, each with its slice of a bias and its dropout."""

    def __init__(self, layer, parts, q, lengths, dropout, seed, parameters=()):
        self.layer, self.q, self.parameters, self.dropout = layer, q, parameters, dropout
        self.joined, self.blocks = len(parts) > 1, [block for part in parts for block in part]
        self.reweighs = type(layer).reweigh is not Attention.reweigh
        if self.joined and self.reweighs:
            raise ValueError(f"reweigh needs complete rows, a plan of one part; this plan has {len(parts)}")
        self.padding = None
        if lengths is not None:
            padded = torch.arange(q.size(2), device=q.device) >= lengths[:, None]
            self.padding = q.new_zeros(padded.shape).masked_fill_(padded, FLOOR)
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self.random = torch.Generator(q.device).manual_seed(seed) if dropout else None
        self.strips = {}
        for block in filter(self.shares, self.blocks):  # one strip holds every offset of its blocks
            key, first = self.geometry(block)
            n, low, high = self.strips.get(key, (0, first, first))
            last = first + len(block.keys) * block.keys.step
            self.strips[key] = max(n, len(block.queries)), min(low, first), max(high, last)
        for (heads, step, key_step, _), (n, low, high) in list(self.strips.items()):
            i, j = range(0, n * step, step), range(low, high, key_step)
            self.strips[heads, step, key_step, low % key_step] = Strip(self, heads, i, j)

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
        self.bias = strip.value[own, *where]
        self.bias_gradient = strip.gradient[own, *where] if strip.gradient is not None else None
        self.shape = heads.stop - heads.start, batch.stop - batch.start, len(queries), len(keys)

    def at(self, x, positions):
        """x (H, B, T, E) at this tile's heads and examples and at `positions`: (h b, n, E), of a
        range a view."""
        x = x[self.heads, self.batch].flatten(0, 1)
        if isinstance(positions, range):
            return x[:, positions.start : positions.stop : positions.step]
        return x[:, positions]

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
            s.view(self.shape).add_(self.take_padding())
        return s

    def take_padding(self):
        keys = slice(self.keys.start, self.keys.stop, self.keys.step) if isinstance(self.keys, range) else self.keys
        return self.walk.padding[self.batch, None, keys]

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
