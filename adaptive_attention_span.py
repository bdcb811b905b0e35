"""Adaptive attention span, and periodic masking: heads that learn how far, and how often, they look.

Adaptive span (Sukhbaatar et al. 2019): head h keeps a key at distance d as far as

    m(d) = clamp((R + z - d) / R, 0, 1)        z = S sigmoid(parameter), its span

Their product of m with exp(score), divided by its sum, is the softmax of score + log m: the bias.
Periodic masking multiplies m by a wave with a learned period p and ratio r, A = p / 4, o = p r:

    w(d) = clamp(A tri(d / p) + o + 1/2, 0, 1)        tri(0) = 1, tri(1/2) = -1

d = i - j; in classifiers |i - j|. python adaptive_attention_span.py draws it.
"""

import itertools
import math

import torch
import torch.nn as nn

import attention
from attention import Block
from configurator import UserError, choose

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


def triangle_wave(x, harmonics=0):
    """tri(x) of period 1, from 1 at 0 to -1 at 1/2: exactly, or its Fourier series up to a harmonic."""
    if not harmonics:
        return 4 * (x - x.round()).abs().neg() + 1
    return sum(8 / (math.pi * k) ** 2 * torch.cos(2 * math.pi * k * x) for k in range(1, harmonics + 1, 2))


class Attention(attention.Attention):
    copy = None  # see `extents`

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        options = self.options
        self.longest, self.softness = options.max_span or self.block_size, options.softness_span_mask
        low, high = options.period_min_triangle_wave_masking, options.period_max_triangle_wave_masking
        if self.longest < 1 or self.softness < 1:
            raise UserError(f"max_span must be at least 0 and softness_span_mask at least 1, got {self.longest}, {self.softness}")
        if not 1 <= low <= high:
            raise UserError(f"expected 1 <= period_min_triangle_wave_masking <= period_max_..., got {low} and {high}")
        ratio = options.ratio_init_triangle_wave_masking
        if not -0.25 < ratio < 0.25:
            raise UserError(f"ratio_init_triangle_wave_masking must be above -1/4 and below 1/4, got {ratio}")
        choose("triangle_wave_harmonics", str(options.triangle_wave_harmonics), ("0", "1", "3", "5"))
        first = options.span_init or [self.longest / 2]
        spans = [first[h % len(first)] for h in range(self.n_head)]
        share = torch.tensor(spans, dtype=torch.float32) / self.longest
        if not ((share > 0) & (share < 1)).all():
            raise UserError(f"span_init: expected spans above 0 and below {self.longest} (max_span), got {options.span_init}")
        self.span = nn.Parameter(torch.logit(share))
        if options.use_triangle_wave_masking:
            self.period = nn.Parameter(torch.logit(torch.rand(self.n_head), eps=0.01))
            self.ratio = nn.Parameter(torch.logit(torch.full((self.n_head,), 2 * ratio + 0.5)))

    def spans(self):
        """z of each head, (H,), in positions."""
        return self.longest * torch.sigmoid(self.span)

    def waves(self):
        """(p, r) of each head, each (H,): the period in positions and the ratio in (-1/4, 1/4)."""
        low, high = self.options.period_min_triangle_wave_masking, self.options.period_max_triangle_wave_masking
        p = low + (high - low) * torch.sigmoid(self.period)
        return p.round() if self.options.snap_periods else p, (torch.sigmoid(self.ratio) - 0.5) / 2

    def wave(self, d, clamped=True):
        """w at distances d (any shape): (H, *d.shape)."""
        p, r = (x.view(-1, *[1] * d.dim()) for x in self.waves())
        x = torch.remainder(d, p) / p  # not d / p, whose fraction is lost far away
        w = p / 4 * triangle_wave(x, self.options.triangle_wave_harmonics) + p * r + 0.5
        return w.clamp(0, 1) if clamped else w

    def bias(self, i, j):
        distance = i[:, None] - j[None]
        d = (distance if self.causal else distance.abs()).to(self.span.dtype)
        mask = ((self.softness + self.spans()[:, None, None] - d) / self.softness).clamp(0, 1)
        if self.options.use_triangle_wave_masking:
            mask = mask * self.wave(d)
        kept = mask > 0
        if self.causal:
            kept = kept & (distance >= 0) & (distance < self.block_size)
        # the inner `where`: at 0 the logarithm's gradient is infinite, and 0 times that is NaN
        return torch.where(kept, torch.where(kept, mask, 1).log(), -math.inf)

    @torch.no_grad()
    def extents(self):
        """What the plan goes by: of each head (farthest distance with m > 0, period, the distances modulo
        the period with w > 0); without snapped periods the last two are 1 and [0], every distance.

        A GPU in training is not waited for: it tells what held at the call before, and there is room
        for what one step of AdamW can change up to a learning rate of 1 / 32.
        """
        rows, room = [self.softness + self.spans()], 0
        if self.options.use_triangle_wave_masking and self.options.snap_periods:
            residues = torch.arange(math.ceil(self.options.period_max_triangle_wave_masking), device=self.span.device)
            rows += [self.waves()[0], *self.wave(residues.to(self.span.dtype), clamped=False).T]
        rows = torch.stack(rows, 1)
        if self.training and rows.is_cuda:
            room = 1 / 128
            copy = rows.to("cpu", non_blocking=True), torch.cuda.current_stream().record_event()
            (rows, event), self.copy = self.copy or copy, copy
            event.synchronize()
        found = []
        for end, *wave in rows.tolist():
            p = round(wave[0]) if wave else 1
            w = [x > -room for x in wave[1 : p + 1]] or [True]
            farthest = math.ceil(end + room * self.longest) - 1
            found.append((min(farthest, self.block_size - 1) if self.causal else farthest, p,
                          [c for c in range(p) if w[c] or w[-c % p]]))
        return found

    def train(self, mode=True):
        self.copy = None  # of the spans, from before they may have been changed otherwise
        return super().train(mode)

    def reach(self):
        return max(farthest for farthest, *_ in self.extents())

    def plan(self, T):
        """Windows as long as each head's span, rounded up: products like round sizes, and while the
        spans move the shapes stay few."""
        part, first = [], 0
        alike = ((32 * math.ceil(min(farthest, T) / 32), *wave) for farthest, *wave in self.extents())
        for (reach, p, residues), group in itertools.groupby(alike):
            heads = range(first, first := first + len(list(group)))
            n = 64 if reach <= 512 else 128
            if len(residues) * (n + reach / p) < n + reach:  # short spans lose more at their edges than they skip
                part += self.snapped(heads, T, n, reach, p, residues)
            else:
                edge = n * max(1, round(reach / n / 4))
                part += [Block(heads, *pair) for pair in self.windows(range(T), n, reach, edge)]
        return [part]

    def snapped(self, heads, T, n, reach, p, residues):
        """Blocks of `heads` for a whole period p: queries that are equal modulo p, with the keys of those
        residues alone that they keep."""
        reach, after, blocks = math.ceil(reach / p), 0 if self.causal else math.ceil(reach / p), []
        for first in range(p):
            queries = range(first, T, p)
            classes = [range((first - c) % p, T, p) for c in residues]
            for a in range(0, len(queries), n):
                runs = []
                for c, keys in zip(residues, classes):
                    nearest = a + (first - c - keys.start) // p  # the place in `keys` of query a's nearest key not after it
                    runs.append(keys[max(0, nearest - reach) : max(0, nearest + n + after)])
                blocks.append(Block(heads, queries[a : a + n], tuple(runs)))
        return blocks

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


if __name__ == "__main__":
    import pattern

    pattern.show_pattern("adaptive_attention_span", span_init=[2.0, 6.0, 12.0, 20.0], softness_span_mask=8, n_head=4)
