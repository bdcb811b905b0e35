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

import itertools
import math

import torch

import attention
from core import blocks
from core.blocks import Block
from core.config import UserError, check_choice
from core.sparse_blocks import diagonal_blocks, near_blocks, residue_blocks, summary_blocks

# One pattern, or several, repeated over the layers or heads: names joined by commas ("local,local,local,dense") or
# letters ("LLLD": Dense, Local, Strided, Fixed, loG).
sparse_pattern = "local"
pattern_by = "layer"  # several patterns are those of the layers; "head": of the heads of each layer
window = 128  # nearest positions that `local` and `log` see, including the query's own
stride = 0  # length of a block; 0: about the square root of block_size, where both parts cost the same
fixed_columns = 4  # summary positions at each block's end: few, since every query reads all of them
# First positions that see all positions and are seen by all, like [CLS] of a classifier. In language models they stay
# visible beyond the window and the block size, as attention sinks do in StreamingLLM (Xiao et al. 2023, section 3.2).
global_tokens = 0

LONGEST = 2**24  # positions: far beyond any text, and safe in integer arithmetic
LETTERS = {"D": "dense", "L": "local", "S": "strided", "F": "fixed", "G": "log"}


def read_patterns(text):
    """(names of the patterns, the letters that they were read from or "") of `sparse_pattern`. Raises UserError."""
    names, letters = text.replace(" ", "").split(","), ""
    if len(names) == 1 and names[0] and set(names[0]) <= LETTERS.keys():
        letters = names[0]
        names = [LETTERS[letter] for letter in letters]
    for name in names:
        check_choice("sparse_pattern", name, LETTERS.values())
    return names, letters


class Attention(attention.Attention):
    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        patterns, letters = read_patterns(self.options.sparse_pattern)
        check_choice("pattern_by", self.options.pattern_by, ("layer", "head"))
        for name, least in (("window", 1), ("stride", 0), ("fixed_columns", 1), ("global_tokens", 0)):
            if not least <= getattr(self.options, name) <= LONGEST:
                raise UserError(f"{name} must be from {least} to {LONGEST:,}, got {getattr(self.options, name)}")
        if letters:
            read = ", ".join(f"{letter} {LETTERS[letter]}" for letter in dict.fromkeys(letters))
            self.description = (f"sparse_pattern {letters}: {read}; a letter for each {self.options.pattern_by}, "
                                "repeated")
        by_head = self.options.pattern_by == "head"
        self.patterns = [patterns[(h if by_head else layer) % len(patterns)] for h in range(self.n_head)]
        kinds = self.kinds = list(dict.fromkeys(self.patterns))
        self.pattern = ",".join(kinds)
        self.register_buffer("kind_of", torch.tensor(list(map(kinds.index, self.patterns))), persistent=False)
        self.window, self.globals = self.options.window, self.options.global_tokens
        self.first_tokens = min(self.globals, self.block_size)
        self.stride = self.options.stride or round(math.sqrt(self.block_size))
        self.columns = min(self.options.fixed_columns, self.stride)
        self.relative = "fixed" not in kinds and not self.globals

    def keeps(self, pattern, i, j):
        """Whether a pattern keeps the pairs of positions i and j, elementwise."""
        distance = (i - j).abs()
        if pattern == "dense":
            return distance >= 0
        if pattern == "local":
            return distance < self.window
        if pattern == "strided":
            return (distance < self.stride) | (distance % self.stride == 0)
        if pattern == "fixed":
            return (i // self.stride == j // self.stride) | (j % self.stride >= self.stride - self.columns)
        return (distance < self.window) | (distance & (distance - 1) == 0)

    def bias(self, h, i, j):
        kept = self.keeps(self.kinds[0], i, j)
        for n, pattern in enumerate(self.kinds[1:], 1):
            kept = torch.where(self.kind_of[h] == n, self.keeps(pattern, i, j), kept)
        if self.globals:
            kept = kept | (i < self.globals) | (j < self.globals)
        return torch.where(kept, 0.0, -math.inf)

    def max_distance(self):
        return min(self.window, self.block_size) - 1 if self.kinds == ["local"] else super().max_distance()

    def blocks(self, T):
        if {"dense", "local"} >= set(self.kinds):
            return super().blocks(T)
        parts = []
        for pattern, heads in itertools.groupby(range(self.n_head), self.patterns.__getitem__):
            heads = list(heads)
            added = self.parts(pattern, range(heads[0], heads[-1] + 1), T)
            parts = [sum(both, []) for both in itertools.zip_longest(parts, added, fillvalue=[])]
        return [part for part in parts if part]

    def parts(self, pattern, heads, T):
        """The blocks of a pattern for some neighbouring heads, as parts."""
        g = min(self.globals, T)
        rest = range(g, T)  # positions of the pattern; the global tokens have blocks of their own
        if pattern in ("dense", "local"):
            window = min(T, self.window if pattern == "local" else T)
            parts = [near_blocks(heads, rest, window, range(T), self.causal)]
        elif pattern == "strided":
            parts = [near_blocks(heads, rest, self.stride, range(self.stride), self.causal),
                     residue_blocks(heads, rest, self.stride, T, range(self.stride, T), self.causal)]
        elif pattern == "fixed":
            parts = [diagonal_blocks(heads, rest, self.stride, self.columns),
                     summary_blocks(heads, rest, self.stride, self.columns, self.causal)]
        else:
            # Distances that are powers of two beyond the window: among positions equal modulo `step` they are again
            # 1, 2, 4, ... places, so a window of 64 places covers seven of them.
            step = 2 ** math.ceil(math.log2(self.window))
            parts = [near_blocks(heads, rest, self.window, range(step), self.causal)]
            while step < T:
                parts.append(residue_blocks(heads, rest, step, 64, range(step, 128 * step), self.causal))
                step *= 128
        if g:
            parts[0] = [Block(heads, range(g), range(g if self.causal else T)), *parts[0]]
            parts.append([Block(heads, queries, range(g)) for queries, _ in blocks.windows(rest, 256, 0)])
        return parts
