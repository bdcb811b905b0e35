"""Adaptive attention span and periodic masking: each head learns how far it looks, and at which distances.

Adaptive span (Sukhbaatar et al. 2019, section 2.2) multiplies exp(score) of a key at distance d by the soft mask

    m(d) = clamp((R + z - d) / R, 0, 1)        z = S sigmoid(parameter), the span of the head

and renormalises, which equals the softmax of score + log m. So log m is the bias.
Periodic masking multiplies m by a wave with a learned period p and ratio r, where A = p / 4 and o = p r:

    w(d) = clamp(A tri(d / p) + o + 1/2, 0, 1)        tri(0) = 1, tri(1/2) = -1

d = i - j; in classifiers |i - j|. `python attention.py adaptive_attention_span` draws it.
"""

import math

import torch
import torch.nn as nn

import attention
from core import blocks
from core.config import UserError, check_choice, short_repr

softness_span_mask = 32  # R, positions over which the mask falls from 1 to 0, so that a span has a gradient
span_reg = 2e-6  # penalty per position of the mean span, as in the paper: small, so that useful spans can grow
max_span = 0  # S, the longest span in positions; 0: block_size
span_init = []  # initial spans in positions, repeated over the heads; []: S / 2
use_triangle_wave_masking = False
period_min_triangle_wave_masking = 2.0  # positions: a shorter period cannot drop keys at whole distances
period_max_triangle_wave_masking = 8.0
ratio_init_triangle_wave_masking = 0.0  # initial r, between -1/4 and 1/4: a lower ratio drops more keys
triangle_wave_harmonics = 5  # tri as a Fourier series up to this harmonic, smoother in p; 0: the exact wave
snap_periods = False  # periods are rounded and fixed, so that training and prefill skip keys where w = 0

KEEP_SELF = 1e-6  # minimum of a query's mask for its own key, so that no row is empty
LONGEST = 2**24  # float32 represents all positions up to here


def triangle_wave(x, harmonics=0):
    """tri(x) of period 1, from 1 at 0 to -1 at 1/2, elementwise. harmonics: of its Fourier series; 0: exact."""
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
        self.span = nn.Parameter(torch.logit(torch.tensor(spans, dtype=torch.float32) / self.longest))
        if options.use_triangle_wave_masking:
            self.low, self.high = low, high
            self.period = nn.Parameter(torch.logit(torch.rand(self.n_head), eps=0.01))
            ratios = torch.full((self.n_head,), options.ratio_init_triangle_wave_masking)
            self.ratio = nn.Parameter(torch.logit(2 * ratios + 0.5))

    def spans(self):
        """The span z of each head in positions, (H,)."""
        return self.longest * torch.sigmoid(self.span)

    def waves(self):
        """The period p in positions and the ratio r in (-1/4, 1/4) of each head, each (H,)."""
        p = self.low + (self.high - self.low) * torch.sigmoid(self.period)
        return p.round() if self.options.snap_periods else p, (torch.sigmoid(self.ratio) - 0.5) / 2

    def wave(self, h, d):
        """w of heads h at distances d (floating point), which broadcast."""
        p, r = (x[h] for x in self.waves())
        x = torch.remainder(d, p) / p  # the fractional part of d / p loses precision at large distances
        return (p / 4 * triangle_wave(x, self.options.triangle_wave_harmonics) + p * r + 0.5).clamp(0, 1)

    def bias(self, h, i, j):
        d = (i - j).abs().to(self.span.dtype)
        mask = ((self.softness + self.spans()[h] - d) / self.softness).clamp(0, 1)
        if self.options.use_triangle_wave_masking:
            w = self.wave(h, d)
            mask = mask * torch.where(d == 0, w.clamp(min=KEEP_SELF), w)
        kept = mask > 0
        # the inner `where` avoids the gradient of log at 0, which is infinite, and 0 times infinity is NaN
        return torch.where(kept, torch.where(kept, mask, 1).log(), -math.inf)

    def blocks(self, T):
        """Derived from `bias`, except with whole periods: see `blocks.residue_blocks`."""
        if not (self.options.snap_periods and self.options.use_triangle_wave_masking):
            return super().blocks(T)
        part = []
        with torch.no_grad():
            lengths = torch.ceil(self.softness + self.spans()).long().clamp(max=self.block_size).tolist()
            for h, (length, p) in enumerate(zip(lengths, self.waves()[0].long().tolist())):
                d = torch.arange(min(p, T), dtype=self.span.dtype, device=self.span.device)
                kept = (self.wave(torch.tensor(h, device=d.device), d) > 0).tolist()
                part += blocks.residue_blocks(self, h, T, length, p, kept)
        return [part]

    def penalty(self):
        """span_reg times the mean over heads of z, or with periodic masking of (z + R) times the kept share."""
        if self.options.use_triangle_wave_masking:
            return self.options.span_reg * ((self.spans() + self.softness) * self.kept_of_period()).mean()
        return self.options.span_reg * self.spans().mean()

    def kept_of_period(self):
        """The share of one period where w > 0, (H,); if w > 0 everywhere, 1 plus the minimum of w."""
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
    """Raise UserError for an option out of range."""
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
    if not all(type(z) in (int, float) and 1e-7 < z / layer.longest < 1 - 1e-7 for z in o.span_init):
        raise UserError(f"span_init: expected spans above 0 and below {layer.longest} (max_span), "
                        f"got {short_repr(o.span_init)}")
