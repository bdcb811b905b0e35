"""Sparse attention: fixed patterns of which keys a query sees. `python attention.py sparse` draws them.

    local    the `window` nearest positions                                          n w pairs
    strided  the `stride` nearest, and every `stride`-th before them                 n sqrt(n)
    fixed    the query's own block of `stride`, and the last `fixed_columns`
             positions of every block                                                n sqrt(n)
    log      the `window` nearest, and the distances 1, 2, 4, 8, ...                 n log(n)
    dense    all

strided and fixed: Child et al. 2019, section 4.2, both of their heads' keys in one; log: Li et al.
2019, section 4.2. Causal, or the same in both directions with |i - j|.
"""

import math

import torch

import attention
from core import blocks
from core.blocks import Block
from core.config import UserError, check_choice

# One pattern, or one for each layer, used again from the first where they run out: names with commas
# between ("local,local,local,dense") or letters ("LLLD": Dense, Local, Strided, Fixed, loG).
sparse_pattern = "local"
window = 128  # nearest positions that `local` and `log` see, the query's own among them
stride = 0  # length of a block; 0: near the square root of block_size, where both of its halves cost the same
fixed_columns = 4  # summary positions at each block's end: few, since every query reads all of them
global_tokens = 0  # first positions that see and are seen by all, like a classifier's [CLS]

LONGEST = 2**24  # positions: far beyond any text, and safe in integer arithmetic
LETTERS = {"D": "dense", "L": "local", "S": "strided", "F": "fixed", "G": "log"}


class Attention(attention.Attention):
    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        patterns = self.options.sparse_pattern.replace(" ", "").split(",")
        if len(patterns) == 1 and patterns[0] and set(patterns[0]) <= LETTERS.keys():
            patterns = [LETTERS[letter] for letter in patterns[0]]
        for pattern in patterns:
            check_choice("sparse_pattern", pattern, LETTERS.values())
        for name, least in (("window", 1), ("stride", 0), ("fixed_columns", 1), ("global_tokens", 0)):
            if not least <= getattr(self.options, name) <= LONGEST:
                raise UserError(f"{name} must be from {least} to {LONGEST:,}, got {getattr(self.options, name)}")
        self.pattern = patterns[layer % len(patterns)]
        self.window, self.globals = self.options.window, self.options.global_tokens
        self.stride = self.options.stride or round(math.sqrt(self.block_size))
        self.columns = min(self.options.fixed_columns, self.stride)
        self.relative = self.pattern != "fixed" and not self.globals

    def bias(self, h, i, j):
        distance = (i - j).abs()
        if self.pattern == "dense":
            kept = distance >= 0
        elif self.pattern == "local":
            kept = distance < self.window
        elif self.pattern == "strided":
            kept = (distance < self.stride) | (distance % self.stride == 0)
        elif self.pattern == "fixed":
            kept = (i // self.stride == j // self.stride) | (j % self.stride >= self.stride - self.columns)
        else:
            kept = (distance < self.window) | (distance & (distance - 1) == 0)
        if self.globals:
            kept = kept | (i < self.globals) | (j < self.globals)
        return torch.where(kept, 0.0, -math.inf)

    def blocks(self, T):
        if self.pattern in ("dense", "local"):
            return super().blocks(T)
        heads, g = range(self.n_head), min(self.globals, T)
        rest = range(g, T)  # the pattern's positions; what the first g see and are seen by comes beside
        if self.pattern == "strided":
            parts = [self.near(rest, self.stride, range(self.stride)),
                     self.classes(rest, self.stride, T, range(self.stride, T))]
        elif self.pattern == "fixed":
            parts = [self.own(rest), self.summaries(rest)]
        else:
            # The powers of two beyond the window: among the positions that are equal modulo a power of
            # two they are again 1, 2, 4, ... places away, so that few keys cover seven of them.
            step = 2 ** math.ceil(math.log2(self.window))
            parts = [self.near(rest, self.window, range(step))]
            while step < T:
                parts.append(self.classes(rest, step, 64, range(step, 128 * step)))
                step *= 128
        if g:
            parts[0] = [Block(heads, range(g), range(g if self.causal else T)), *parts[0]]
            parts.append([Block(heads, queries, range(g)) for queries, _ in blocks.windows(rest, 256, 0)])
        return [part for part in parts if part]

    def windows(self, positions, n, before):
        """`blocks.windows`, in classifiers in both directions."""
        return blocks.windows(positions, n, before, 0 if self.causal else before)

    def near(self, positions, window, distances):
        """Blocks of the keys nearer than `window`."""
        before = blocks.ROUND * math.ceil((window - 1) / blocks.ROUND)
        return [Block(range(self.n_head), *pair, distances)
                for pair in self.windows(positions, blocks.queries_of(before, positions.stop), before)]

    def classes(self, positions, step, before, distances):
        """Blocks of the keys whose distance is a multiple of `step`, up to `before` times."""
        pairs = [list(self.windows(positions[first::step], 64, before)) for first in range(min(step, len(positions)))]
        # all classes' first blocks, then all second ones, ...: neighbours that differ by a shift of one
        return [Block(range(self.n_head), *pair[n], distances)
                for n in range(max(map(len, pairs), default=0)) for pair in pairs if n < len(pair)]

    def own(self, positions):
        """`fixed`: some blocks of `stride` at a time, without their summary columns."""
        part, l, T = [], self.stride, positions.stop
        n, rest = max(1, round(64 / l)), l - self.columns
        for start in range(positions.start // l * l, T, n * l):
            starts = [range(max(a, positions.start), min(a + rest, T)) for a in range(start, start + n * l, l)]
            part.append(Block(range(self.n_head), range(max(start, positions.start), min(start + n * l, T)), tuple(starts)))
        return [block for block in part if block.queries and block.kv_ranges]

    def summaries(self, positions):
        """`fixed`: all blocks' summary columns, their own among them. Many queries at a time, so that
        products are of few shapes: each new one costs more to prepare than to compute."""
        part, l, T = [], self.stride, positions.stop
        columns = [range(first, T, l)[len(range(first, positions.start, l)) :] for first in range(l - self.columns, l)]
        n = l * 8 * max(1, round(128 / l))
        for start in range(positions.start // l * l, T, n):
            queries = range(max(start, positions.start), min(start + n, T))
            keys = tuple(column[: len(range(column.start, queries.stop, l))] if self.causal else column for column in columns)
            part.append(Block(range(self.n_head), queries, keys))
        return [block for block in part if block.queries and block.kv_ranges]
