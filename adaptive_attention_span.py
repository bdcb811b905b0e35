"""Adaptive attention span, and periodic masking: heads that learn how far, and how often, they look.

Adaptive span (Sukhbaatar et al. 2019): head h keeps a key at distance d as far as

    m(d) = clamp((R + z - d) / R, 0, 1)        z = S sigmoid(parameter), its span

Their product of m with exp(score), divided by its sum, is the softmax of score + log m: the bias.
Periodic masking multiplies m by a wave with a learned period p and ratio r, A = p / 4, o = p r:

    w(d) = clamp(A tri(d / p) + o + 1/2, 0, 1)        tri(0) = 1, tri(1/2) = -1

d = i - j; in classifiers |i - j|. `python attention.py adaptive_attention_span` draws it.
"""

import math

import torch
import torch.nn as nn

import attention
from core import blocks
from core.blocks import Block
from core.config import UserError, check_choice, short_repr

softness_span_mask = 32  # R, positions in which the mask falls from 1 to 0: so that a span has a gradient
span_reg = 2e-6  # loss for each position of the mean span, as in the paper: little, for spans that help
max_span = 0  # S, the longest span in positions; 0: block_size
span_init = []  # first spans in positions, one for each head, used again where they run out; []: half of S
use_triangle_wave_masking = False
period_min_triangle_wave_masking = 2.0  # positions: below 2 there is nothing between two keys to leave out
period_max_triangle_wave_masking = 8.0
ratio_init_triangle_wave_masking = 0.0  # first r of every head, between -1/4 and 1/4: below 0 it drops more keys
triangle_wave_harmonics = 5  # tri as its Fourier series up to here, smoother in p; 0: the exact wave
snap_periods = False  # whole periods, fixed: then keys where w = 0 cost nothing in training and prefill either

KEEP_SELF = 1e-6  # least mask of a query's own key: no row is empty, however long the period and low the ratio
LONGEST = 2**24  # positions that float32 still tells apart


def triangle_wave(x, harmonics=0):
    """tri(x) of period 1, from 1 at 0 to -1 at 1/2: exactly, or its Fourier series up to a harmonic."""
    if not harmonics:
        return 4 * (x - x.round()).abs().neg() + 1
    return sum(8 / (math.pi * k) ** 2 * torch.cos(2 * math.pi * k * x) for k in range(1, harmonics + 1, 2))


class Attention(attention.Attention):
    relative = True

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        options = self.options
        self.longest, self.softness = options.max_span or self.block_size, options.softness_span_mask
        low, high = options.period_min_triangle_wave_masking, options.period_max_triangle_wave_masking
        check_options(self)
        first = options.span_init or [self.longest / 2]
        spans = [first[h % len(first)] for h in range(self.n_head)]
        share = torch.tensor(spans, dtype=torch.float32) / self.longest
        self.span = nn.Parameter(torch.logit(share))
        if options.use_triangle_wave_masking:
            self.low, self.high = low, high
            self.period = nn.Parameter(torch.logit(torch.rand(self.n_head), eps=0.01))
            self.ratio = nn.Parameter(torch.logit(torch.full((self.n_head,), 2 * options.ratio_init_triangle_wave_masking + 0.5)))

    def spans(self):
        """z of each head, (H,), in positions."""
        return self.longest * torch.sigmoid(self.span)

    def waves(self):
        """(p, r) of each head, each (H,): the period in positions and the ratio in (-1/4, 1/4)."""
        p = self.low + (self.high - self.low) * torch.sigmoid(self.period)
        return p.round() if self.options.snap_periods else p, (torch.sigmoid(self.ratio) - 0.5) / 2

    def wave(self, h, d):
        """w of heads h at distances d, which broadcast."""
        p, r = (x[h] for x in self.waves())
        x = torch.remainder(d, p) / p  # not d / p, whose fraction is lost far away
        return (p / 4 * triangle_wave(x, self.options.triangle_wave_harmonics) + p * r + 0.5).clamp(0, 1)

    def bias(self, h, i, j):
        d = (i - j).abs().to(self.span.dtype)
        mask = ((self.softness + self.spans()[h] - d) / self.softness).clamp(0, 1)
        if self.options.use_triangle_wave_masking:
            w = self.wave(h, d)
            mask = mask * torch.where(d == 0, w.clamp(min=KEEP_SELF), w)
        kept = mask > 0
        # the inner `where`: at 0 the logarithm's gradient is infinite, and 0 times that is NaN
        return torch.where(kept, torch.where(kept, mask, 1).log(), -math.inf)

    def blocks(self, T):
        """Derived, but for whole periods: queries of one residue modulo the period with the residues that they keep."""
        if not (self.options.snap_periods and self.options.use_triangle_wave_masking):
            return super().blocks(T)
        part = []
        with torch.no_grad():
            ends = torch.ceil(self.softness + self.spans()).long().clamp(max=self.block_size).tolist()
            for head, (end, p) in enumerate(zip(ends, self.waves()[0].long().tolist())):
                before = min(T, blocks.ROUND * math.ceil((end - 1) / blocks.ROUND))
                d, h = torch.arange(min(p, before + 1), device=self.span.device), torch.tensor(head, device=self.span.device)
                w = (self.wave(h, d.to(self.span.dtype)) > 0).tolist()
                kept = [c for c in range(len(w)) if c == 0 or w[c] or w[-c % len(w)]]
                part += self.blocks_of_residues(range(head, head + 1), T, before, p, kept)
        return [part]

    def blocks_of_residues(self, heads, T, before, p, kept):
        """Blocks of queries that are equal modulo p, with the keys at the `kept` distances modulo p alone."""
        n = blocks.queries_of(before, T)
        if p > before or len(kept) * (n + before / p) >= n + before:  # short spans lose more at their edges than they skip
            after = 0 if self.causal else before
            return [Block(heads, *pair) for pair in blocks.windows(range(T), n, before, after)]
        before, part = math.ceil(before / p), []
        after = 0 if self.causal else before
        for first in range(p):
            queries = range(first, T, p)
            for a in range(0, len(queries), n):
                keys = []
                for c in kept:
                    residue = range((first - c) % p, T, p)
                    nearest = a + (first - c - residue.start) // p  # place in `residue` of the last key not after query a
                    keys.append(residue[max(0, nearest - before) : max(0, nearest + n + after)])
                part.append(Block(heads, queries[a : a + n], tuple(keys)))
        return part

    def penalty(self):
        """span_reg times the mean over heads of z, or with periodic masking of (z + R) kept."""
        if self.options.use_triangle_wave_masking:
            return self.options.span_reg * ((self.spans() + self.softness) * self.kept_of_period()).mean()
        return self.options.span_reg * self.spans().mean()

    def kept_of_period(self):
        """The share of one period where w > 0, (H,); where that is all of it, 1 + the least of w."""
        p, r = self.waves()
        share = 1 / p + 2 * r + 0.5
        return torch.where(share < 1, share, 1 + 0.5 + p * r - p / 4)

    def stats(self):
        stats = super().stats() | {"spans": self.spans().tolist()}
        if self.options.use_triangle_wave_masking:
            p, r = self.waves()
            stats |= {"periods": p.tolist(), "ratios": r.tolist()}
        return stats


def check_options(layer):
    """Raise UserError for an option that no mask can have."""
    o = layer.options
    low, high = o.period_min_triangle_wave_masking, o.period_max_triangle_wave_masking
    if not (1 <= layer.longest <= LONGEST and 1 <= layer.softness <= LONGEST):
        raise UserError(f"max_span must be at least 0 and softness_span_mask at least 1, both at most {LONGEST:,}; "
                        f"got {o.max_span}, {o.softness_span_mask}")
    if not 1 <= low <= high <= LONGEST:
        raise UserError("expected 1 <= period_min_triangle_wave_masking <= period_max_triangle_wave_masking "
                        f"<= {LONGEST:,}, got {low} and {high}")
    if not -0.25 < o.ratio_init_triangle_wave_masking < 0.25:
        raise UserError("ratio_init_triangle_wave_masking must be above -1/4 and below 1/4, got "
                        f"{o.ratio_init_triangle_wave_masking}")
    check_choice("triangle_wave_harmonics", str(o.triangle_wave_harmonics), ("0", "1", "3", "5"))
    if not all(type(z) in (int, float) and 1e-7 < z / layer.longest < 1 - 1e-7 for z in o.span_init):  # of float32
        raise UserError(f"span_init: expected spans above 0 and below {layer.longest} (max_span), got {short_repr(o.span_init)}")
