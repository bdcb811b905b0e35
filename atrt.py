"""ATRT, adaptive token ranking and transformation: attention that raises its large weights.

A softmax weight a is ranked by s = (a - mu) / sigma, where mu and sigma are the mean and the standard deviation of the
weights that it is compared with, and multiplied by a factor that depends on s only (`Attention.factor`). Bias and
blocks are those of dense attention. `python attention.py atrt` draws it.
"""

import math

import torch

import attention
from core import ranking
from core.config import UserError, check_choice

atrt_scope = "row"  # compare with the keys a query sees; "matrix": with all weights of a head, classifiers only
atrt_renormalize = True  # divide by the new row sum, so that each output stays an average
atrt_task = "classification"  # default borders and factors; "summarization": broader zones, smaller factors
atrt_borders = []  # [low, high] in standard deviations: of the moderate and of the high zone; []: the task's
atrt_factors = []  # [moderate at its edges, in its middle, high at its border, at the top]; []: the task's
atrt_sharpness = 1.0  # how fast the high factor approaches its top: 1 within two deviations, 0 never

TASKS = {  # borders, factors
    "classification": ([0.0, 1.5], [1.10, 1.15, 1.25, 1.30]),
    "summarization": ([0.0, 1.0], [1.08, 1.12, 1.15, 1.20]),
}
WIDTH = 0.2  # standard deviation of the moderate zone's Gaussian as a share of the zone: 0.3 of 1.5
LARGEST = 1e4  # limit of borders, factors and sharpness, safe in float32


class Attention(attention.Attention):
    """Dense attention whose larger weights are raised before they are applied to the values."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        o = self.options
        check_choice("atrt_scope", o.atrt_scope, ("row", "matrix"))
        check_choice("atrt_task", o.atrt_task, TASKS)
        if o.atrt_scope == "matrix" and self.causal:
            raise UserError("atrt_scope=matrix ranks a query's weights among those of later queries, which a language "
                            "model must not see: use atrt_scope=row, or train a classifier")
        borders, factors = TASKS[o.atrt_task]
        self.borders = numbers("atrt_borders", o.atrt_borders, borders)
        self.factors = numbers("atrt_factors", o.atrt_factors, factors)
        if self.borders[0] >= self.borders[1]:
            raise UserError(f"atrt_borders must be in order, like {borders}; got {o.atrt_borders}")
        if max(map(abs, self.borders)) > LARGEST or self.borders[1] - self.borders[0] < 1 / LARGEST:
            raise UserError(f"atrt_borders must lie within {LARGEST:,.0f} of 0 and apart, like {borders}; "
                            f"got {o.atrt_borders}")
        if not 1 / LARGEST <= min(self.factors) <= max(self.factors) <= LARGEST:
            raise UserError(f"atrt_factors must be above 0 (1 changes nothing) and at most {LARGEST:,.0f}, "
                            f"like {factors}; got {o.atrt_factors}")
        if not 0 <= o.atrt_sharpness <= LARGEST:
            raise UserError(f"atrt_sharpness must be from 0 to {LARGEST:,.0f}, like 1.0; got {o.atrt_sharpness}")
        self.scope, self.renormalize = o.atrt_scope, o.atrt_renormalize
        self.zones = ranking.Zones(self.borders, self.factors, o.atrt_sharpness, WIDTH)

    def factor(self, p, keys, variation):
        """The factor f of weights p, where s = (p - mu) / sigma, mu = 1 / keys and (sigma / mu)^2 = variation:

            s > high           f = top - (top - border) exp(-sharpness (s - high)^2 / 2)
            low < s <= high    f = edge + (middle - edge) (g(s) - g(low)) / (g(centre) - g(low))
            s <= low           f = 1

        g is a Gaussian around the centre of the moderate zone, with standard deviation WIDTH (high - low).
        """
        (low, high), (edge, middle, border, top) = self.borders, self.factors
        tiny = torch.finfo(p.dtype).eps
        # s = 0 if weights differ by no more than the rounding of their sums
        s = torch.where(variation > 16 * tiny, (p * keys - 1) * variation.clamp(min=16 * tiny).rsqrt(), 0)

        def g(s):
            return torch.exp(-((s - (low + high) / 2) ** 2) / (2 * (WIDTH * (high - low)) ** 2))

        g_low = math.exp(-1 / (8 * WIDTH**2))
        moderate = edge + (middle - edge) * (g(s) - g_low) / (1 - g_low)
        raised = top - (top - border) * torch.exp(-self.options.atrt_sharpness * (s - high) ** 2 / 2)
        # s above the border by no more than its rounding is on the border: of two keys s is always 1 or -1
        rounding = 4 * tiny * (1 + 1 / variation.clamp(min=16 * tiny))
        return torch.where(s > high + rounding, raised, torch.where(s > low, moderate, 1))

    def reweigh(self, p, keys, variation=None):
        """p f / sum(p f), or p f: equal to the base class's, in fewer passes over the weights."""
        return ranking.reweigh(p, keys, variation, self.zones, self.renormalize)


def numbers(name, value, default):
    """An option's numbers, or `default` for []. Raises UserError unless there are as many finite numbers."""
    if not value:
        return default
    if len(value) != len(default) or not all(type(x) in (int, float) and math.isfinite(x) for x in value):
        raise UserError(f"{name} expects {len(default)} numbers like {default}, or [] for those of atrt_task; "
                        f"got {value}")
    return value
