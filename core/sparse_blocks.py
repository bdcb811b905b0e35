"""Blocks of the patterns of sparse attention, for some heads and positions: near keys, equal residues, summary columns.

Letters: T time, l stride.
"""

import math

from core import blocks
from core.blocks import Block


def near_blocks(heads, positions, window, distances, causal):
    """Blocks of the keys nearer than `window`. distances: those that they cover, see `Block`."""
    before = blocks.ROUND * math.ceil((window - 1) / blocks.ROUND)
    after = 0 if causal else before
    return [Block(heads, *pair, distances)
            for pair in blocks.windows(positions, blocks.queries_of(before, positions.stop), before, after)]


def residue_blocks(heads, positions, step, before, distances, causal):
    """Blocks of the keys whose distance is a multiple of `step`, at most `before` times `step`."""
    after = 0 if causal else before
    pairs = [list(blocks.windows(positions[first::step], 64, before, after))
             for first in range(min(step, len(positions)))]
    # the first blocks of all residues, then the second ones, ...: neighbours differ by a shift of one and stack
    return [Block(heads, *pair[n], distances)
            for n in range(max(map(len, pairs), default=0)) for pair in pairs if n < len(pair)]


def diagonal_blocks(heads, positions, l, columns):
    """`fixed`: several blocks of l positions at a time, without their last `columns`."""
    part, T = [], positions.stop
    n, rest = max(1, round(64 / l)), l - columns
    for start in range(positions.start // l * l, T, n * l):
        queries = range(max(start, positions.start), min(start + n * l, T))
        keys = tuple(range(max(a, positions.start), min(a + rest, T)) for a in range(start, start + n * l, l))
        part.append(Block(heads, queries, keys))
    return [block for block in part if block.queries and block.kv_ranges]


def summary_blocks(heads, positions, l, columns, causal):
    """`fixed`: the last `columns` of all blocks, for many queries at a time, so that products have few shapes."""
    part, T = [], positions.stop
    ranges = [range(first, T, l)[len(range(first, positions.start, l)) :] for first in range(l - columns, l)]
    n = l * 8 * max(1, round(128 / l))
    for start in range(positions.start // l * l, T, n):
        queries = range(max(start, positions.start), min(start + n, T))
        keys = tuple(ranges)
        if causal:
            keys = tuple(column[: len(range(column.start, queries.stop, l))] for column in ranges)
        part.append(Block(heads, queries, keys))
    return [block for block in part if block.queries and block.kv_ranges]
