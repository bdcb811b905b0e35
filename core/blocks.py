"""Where to multiply: blocks of heads, queries and keys, written by a mechanism or derived from its formula.

A part is a list of blocks in which each query of a head occurs in at most one block. Blocks of equal shape and bias are
stacked, so that one batched product computes many of them.

Letters: T time, H heads, n queries, m keys.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch

CELL = 64  # queries and keys of the cells that cover a pattern which is not relative
GAP = 256  # shorter gaps between kept distances are multiplied too; must exceed n + 2 ROUND in `relative_blocks`
ROUND = 32  # widths are multiples of it: products are faster at round sizes, and moving spans give few shapes


class Block(NamedTuple):
    """All pairs of `queries` x `keys`, multiplied densely for each of `heads`.

    heads: a range of neighbouring heads. queries: a range of positions. keys: a range, or a tuple of disjoint ranges.
    distances: the range of |i - j| that the block covers; other pairs are masked, since another part covers them. None:
    all.
    """

    heads: range
    queries: range
    keys: range | tuple
    distances: range | None = None

    @property
    def kv_ranges(self):
        """`keys` as a tuple of non-empty ranges."""
        return tuple(keys for keys in (self.keys if isinstance(self.keys, tuple) else (self.keys,)) if keys)

    @property
    def pairs(self):
        return len(self.heads) * len(self.queries) * sum(map(len, self.kv_ranges))

    def shape(self):
        """What blocks must have in common to be stacked."""
        keys = tuple((len(keys), keys.step) for keys in self.kv_ranges)
        return self.heads, len(self.queries), self.queries.step, keys, self.distances


class Stack(NamedTuple):
    """`count` blocks, of which `block` is the first. The queries of each lie `shift` positions after those of the one
    before, and its key ranges `kv_shifts`: `shift` too, or 0 if all blocks share the same keys."""

    block: Block
    count: int
    shift: int
    kv_shifts: tuple


def windows(positions, n, before, after=0, edge=0):
    """Yield (queries, keys) of a sliding window over `positions` (a range): n queries, and the keys among `positions`
    from `before` places before the first query to `after` places after the last.

    edge: queries per block while the start cuts the window off, where no two blocks have the same shape (0: n).
    """
    a = 0
    while a < len(positions):
        b = a + (edge or n if a < before else n)
        yield positions[a:b], positions[max(0, a - before) : max(0, b + after)]
        a = b


# ---- derived from the formula --------------------------------------------------------------


@torch.no_grad()
def derive(layer, T):
    """One part that covers every pair whose bias is above -inf, derived from the formula: see `find`."""
    if layer.relative:
        kept = (layer.bias_by_offset(T, future=not layer.causal) > -math.inf).cpu().numpy()
        last_kept, last_bands, parts = layer.blocks_of.get((T, "derived"), (None, None, None))
        if not np.array_equal(kept, last_kept):
            bands_of = [bands(row.nonzero()[0] + 1 - T) for row in kept] * (layer.n_head // len(kept))
            if bands_of != last_bands:  # else the same object again: what is made of it is cached
                parts = [relative_blocks(layer, T, bands_of)]
            layer.blocks_of[T, "derived"] = kept, bands_of, parts
        return parts
    if layer.mask_parameters():  # training may change which pairs are kept
        heads, before, after = range(layer.n_head), *((layer.block_size - 1, 0) if layer.causal else (T, T))
        return [[Block(heads, *pair) for pair in windows(range(T), CELL, before, after)]]
    return [cell_blocks(layer, T)]


def find(layer, T):
    """`layer.blocks(T)`, cached by T if no parameter can change them."""
    if layer.mask_parameters():
        return layer.blocks(T)
    if T not in layer.blocks_of:
        layer.blocks_of[T] = layer.blocks(T)
    return layer.blocks_of[T]


@torch.no_grad()
def count_kept(layer, T):
    """Query-key pairs per head whose bias is not -inf, for a text of T tokens (float: a mean over heads)."""
    if layer.relative:
        kept = layer.bias_by_offset(T) > -math.inf
        offset = torch.arange(1 - T, T, device=kept.device)
        return (kept * (T - offset.abs())).sum().item() / kept.size(0)
    total, j = 0, torch.arange(T, device=layer.proj.weight.device)
    for i in j.split(256):
        bias = layer.bias_at(i, j)
        total += (bias > -math.inf).sum().item() / bias.size(0)
    return total


def relative_blocks(layer, T, bands_of):
    """Blocks that cover each head's bands of offsets; neighbouring heads with equal bands share blocks."""
    part, first = [], 0
    while first < layer.n_head:
        last = next((h for h in range(first, layer.n_head) if bands_of[h] != bands_of[first]), layer.n_head)
        heads, (lows, highs) = range(first, last), zip(*bands_of[first]) if bands_of[first] else ((), ())
        first = last
        if len(lows) == 1:
            before, after = max(0, -lows[0]), max(0, highs[0])
            n = queries_of(before, T)
            # few heads make small tiles, where starting an operation costs more than multiplying masked pairs
            edge = n if len(heads) == layer.n_head else n * max(1, round(min(before, T) / n / 4))
            part += [Block(heads, *pair) for pair in windows(range(T), n, before, after, edge)]
        elif lows:
            for a in range(0, T, 64):
                b = min(a + 64, T)
                keys = tuple(range(max(0, a + low), max(0, min(b + high, T))) for low, high in zip(lows, highs))
                part.append(Block(heads, range(a, b), keys))
    return [block for block in part if block.kv_ranges]


def residue_blocks(layer, head, T, length, period, kept):
    """Blocks of one head whose bias has a period of whole positions: only keys of kept residues are multiplied.

    length: larger distances are dropped, this one too. kept: for each distance below min(period, T), whether the wave
    keeps it. A short span becomes a plain window, which then multiplies fewer pairs.
    """
    before = min(T, ROUND * math.ceil((length - 1) / ROUND))
    residues = [c for c, keeps in enumerate(kept) if c == 0 or keeps or kept[-c % len(kept)]]
    heads, n = range(head, head + 1), queries_of(before, T)
    if period > before or len(residues) * (n + before / period) >= n + before:
        return [Block(heads, *pair) for pair in windows(range(T), n, before, 0 if layer.causal else before)]
    before, part = math.ceil(before / period), []
    after = 0 if layer.causal else before
    for first in range(period):
        queries = range(first, T, period)
        for a in range(0, len(queries), n):
            keys = []
            for c in residues:
                positions = range((first - c) % period, T, period)
                nearest = a + (first - c - positions.start) // period  # index of the last key not after query a
                keys.append(positions[max(0, nearest - before) : max(0, nearest + n + after)])
            part.append(Block(heads, queries[a : a + n], tuple(keys)))
    return part


def queries_of(before, T):
    """The number of queries of a block whose window has `before` positions: fewer multiply fewer masked pairs."""
    if before >= T - 1:
        return 64 if T <= 256 else 128 if T <= 1024 else 256
    return 64 if before <= 128 else 96 if before <= 512 else 128


def bands(offsets):
    """[(low, high), ...] that contain all of the ascending `offsets`, rounded outwards; gaps below GAP are filled."""
    if not len(offsets):
        return []
    cuts = np.flatnonzero(np.diff(offsets) > GAP)
    lows, highs = offsets[np.r_[0, cuts + 1]], offsets[np.r_[cuts, len(offsets) - 1]]
    return [(ROUND * math.floor(low / ROUND), ROUND * math.ceil(high / ROUND)) for low, high in zip(lows, highs)]


def cell_blocks(layer, T):
    """The cells of CELL x CELL that contain a kept pair; neighbouring heads with equal cells share blocks."""
    device, starts = layer.proj.weight.device, range(0, T, CELL)
    j = torch.arange(T, device=device)
    rows = []
    for a in starts:
        kept = (layer.bias_at(j[a : a + CELL], j) > -math.inf).any(1)  # (H or 1, T)
        rows.append(torch.nn.functional.pad(kept, (0, -T % CELL)).unflatten(1, (-1, CELL)).any(2))
    cells = torch.stack(rows, 1).expand(layer.n_head, -1, -1).cpu().numpy()  # (H, queries, keys)
    part, first = [], 0
    while first < layer.n_head:
        last = next((h for h in range(first, layer.n_head) if (cells[h] != cells[first]).any()), layer.n_head)
        for a, row in zip(starts, cells[first]):
            edges = np.flatnonzero(np.diff(np.r_[False, row, False])).reshape(-1, 2) * CELL
            keys = tuple(range(low, min(high, T)) for low, high in edges.tolist())
            if keys:
                part.append(Block(range(first, last), range(a, min(a + CELL, T)), keys))
        first = last
    return part


# ---- stacks --------------------------------------------------------------------------------


def stack(layer, part):
    """The blocks of a part in order, where neighbours of equal shape and bias form one stack."""
    stacks, shape, bias = [], None, None
    for block in part:
        same_shape, shape, previous = shape == block.shape(), block.shape(), bias
        bias = None if layer.relative else digest_of_bias(layer, block)
        if same_shape and (layer.relative or bias is not None and bias == previous):
            if joined := join(stacks[-1], block, layer.relative):
                stacks[-1] = joined
                continue
        stacks.append(Stack(block, 1, 0, (0,) * len(block.kv_ranges)))
    return stacks


def join(stack, block, relative):
    """`stack` extended by a block of its shape, or None if the block does not lie at the next shift."""
    first, count, *_ = stack
    ahead = block.queries.start - first.queries.start
    kv_ahead = tuple(b.start - a.start for a, b in zip(first.kv_ranges, block.kv_ranges))
    shift = stack.shift or ahead
    kv_shifts = stack.kv_shifts if count > 1 else kv_ahead
    if not ahead == count * shift > 0 or kv_ahead != tuple(count * each for each in kv_shifts):
        return None
    for keys, each in zip(first.kv_ranges, kv_shifts):
        # keys of different residues must not overlap: `Tile.scatter_add` takes turns only within one residue
        apart = each == 0 and not relative or each == shift and (shift % keys.step == 0 or ahead < keys.step)
        if not apart:
            return None
    return Stack(first, count + 1, shift, kv_shifts)


@torch.no_grad()
def digest_of_bias(layer, block):
    """A digest that is equal for blocks of equal shape and bias; None if a parameter can make their biases differ."""
    if layer.mask_parameters():
        return None
    return hashlib.sha256(block_bias(layer, block).contiguous().cpu().numpy().tobytes()).digest()


def block_bias(layer, block):
    """The bias of a block, (h or 1, n, m), -inf at distances that it does not cover; differentiable."""
    device = layer.proj.weight.device
    i, *j = (torch.arange(x.start, x.stop, x.step, dtype=torch.int32, device=device)
             for x in (block.queries, *block.kv_ranges))
    j = torch.cat(j)
    bias = layer.bias_at(i, j, block.heads)
    return bias if block.distances is None else mask_distances(bias, (j - i[:, None]).abs(), block.distances, -math.inf)


def mask_distances(bias, distance, distances, dropped):
    """`bias` where `distance` is in the range `distances` (None: all), else the value `dropped`."""
    if distances is None:
        return bias
    return bias.masked_fill((distance < distances.start) | (distance >= distances.stop), dropped)
