"""Sparse attention: fixed patterns of the keys that a query sees. `python attention.py sparse` draws them.

    local    the `window` nearest positions                                          n w pairs
    strided  the `stride` nearest positions, and every `stride`-th before them       n sqrt(n)
    fixed    the query's own block of `stride` positions, and the last
             `fixed_columns` positions of every block                                n sqrt(n)
    log      the `window` nearest positions, and the distances 1, 2, 4, 8, ...       n log(n)
    dense    all positions                                                           n n

strided and fixed: Child et al. 2019, section 4.2, with the keys of both their heads in each head; log: Li et al. 2019,
section 4.2. Distances are i - j in language models, |i - j| in classifiers.
"""

import math

import torch

import attention
from core import blocks
from core.blocks import Block
from core.config import UserError, check_choice

# One pattern, or one per layer, repeated over the layers: names joined by commas ("local,local,local,dense") or letters
# ("LLLD": Dense, Local, Strided, Fixed, loG).
sparse_pattern = "local"
window = 128  # nearest positions that `local` and `log` see, including the query's own
stride = 0  # length of a block; 0: about the square root of block_size, where both parts cost the same
fixed_columns = 4  # summary positions at each block's end: few, since every query reads all of them
global_tokens = 0  # first positions that see all positions and are seen by all, like [CLS] of a classifier

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
        rest = range(g, T)  # positions of the pattern; the global tokens have blocks of their own
        if self.pattern == "strided":
            parts = [self.near_blocks(rest, self.stride, range(self.stride)),
                     self.residue_blocks(rest, self.stride, T, range(self.stride, T))]
        elif self.pattern == "fixed":
            parts = [self.diagonal_blocks(rest), self.summary_blocks(rest)]
        else:
            # Distances that are powers of two beyond the window: among positions equal modulo `step` they are again
            # 1, 2, 4, ... places, so a window of 64 places covers seven of them.
            step = 2 ** math.ceil(math.log2(self.window))
            parts = [self.near_blocks(rest, self.window, range(step))]
            while step < T:
                parts.append(self.residue_blocks(rest, step, 64, range(step, 128 * step)))
                step *= 128
        if g:
            parts[0] = [Block(heads, range(g), range(g if self.causal else T)), *parts[0]]
            parts.append([Block(heads, queries, range(g)) for queries, _ in blocks.windows(rest, 256, 0)])
        return [part for part in parts if part]

    def windows(self, positions, n, before):
        """`blocks.windows`; in classifiers in both directions."""
        return blocks.windows(positions, n, before, 0 if self.causal else before)

    def near_blocks(self, positions, window, distances):
        """Blocks of the keys nearer than `window`."""
        before = blocks.ROUND * math.ceil((window - 1) / blocks.ROUND)
        return [Block(range(self.n_head), *pair, distances)
                for pair in self.windows(positions, blocks.queries_of(before, positions.stop), before)]

    def residue_blocks(self, positions, step, before, distances):
        """Blocks of the keys whose distance is a multiple of `step`, at most `before` times `step`."""
        pairs = [list(self.windows(positions[first::step], 64, before)) for first in range(min(step, len(positions)))]
        # the first blocks of all residues, then the second ones, ...: neighbours differ by a shift of one and stack
        return [Block(range(self.n_head), *pair[n], distances)
                for n in range(max(map(len, pairs), default=0)) for pair in pairs if n < len(pair)]

    def diagonal_blocks(self, positions):
        """`fixed`: several blocks of `stride` at a time, without their summary columns."""
        part, l, T = [], self.stride, positions.stop
        n, rest = max(1, round(64 / l)), l - self.columns
        for start in range(positions.start // l * l, T, n * l):
            queries = range(max(start, positions.start), min(start + n * l, T))
            keys = tuple(range(max(a, positions.start), min(a + rest, T)) for a in range(start, start + n * l, l))
            part.append(Block(range(self.n_head), queries, keys))
        return [block for block in part if block.queries and block.kv_ranges]

    def summary_blocks(self, positions):
        """`fixed`: the summary columns of all blocks, for many queries at a time, so that products have few shapes."""
        part, l, T = [], self.stride, positions.stop
        columns = [range(first, T, l)[len(range(first, positions.start, l)) :] for first in range(l - self.columns, l)]
        n = l * 8 * max(1, round(128 / l))
        for start in range(positions.start // l * l, T, n):
            queries = range(max(start, positions.start), min(start + n, T))
            keys = tuple(columns)
            if self.causal:
                keys = tuple(column[: len(range(column.start, queries.stop, l))] for column in columns)
            part.append(Block(range(self.n_head), queries, keys))
        return [block for block in part if block.queries and block.kv_ranges]
