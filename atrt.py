"""Attention that raises its own large weights: adaptive token ranking and transformation (ATRT).

A softmax weight a is ranked by s = (a - mu) / sigma, with the mean and the standard deviation of
the weights it stands among, and multiplied by a factor that depends on s alone (`Attention.gains`).
Bias and plan are those of dense attention. python atrt.py draws it.

Letters: B batch, T time, H heads; n queries, m keys.
"""

import math

import torch
import torch.nn.functional as F

import attention
import engine
from configurator import UserError, choose
from engine import wide

atrt_scope = "row"  # ranked among the keys a query sees; "matrix": among all weights of a head, for classifiers only
atrt_renormalize = True  # divide by the new row sum, so that a query's weights stay an average
atrt_task = "classification"  # whose borders and factors, where none are given; "summarization": broader, gentler
atrt_borders = []  # [low, high] in standard deviations: moderate is above low, high above high; empty: the task's
atrt_factors = []  # [moderate at the edges, moderate in the middle, high at the border, high at the top]; empty: the task's
atrt_sharpness = 1.0  # how fast the high factor nears its top: 1 within two deviations of the border, 0 never

TASKS = {  # borders, factors
    "classification": ([0.0, 1.5], [1.10, 1.15, 1.25, 1.30]),
    "summarization": ([0.0, 1.0], [1.08, 1.12, 1.15, 1.20]),
}
WIDTH = 0.2  # the deviation of the moderate zone's Gaussian, as a share of the zone: 0.3 of 1.5


class Attention(attention.Attention):
    """Dense attention whose weights are ranked, and the larger ones raised, before they meet the values."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        o = self.options
        choose("atrt_scope", o.atrt_scope, ("row", "matrix"))
        choose("atrt_task", o.atrt_task, TASKS)
        if o.atrt_scope == "matrix" and self.causal:
            raise UserError("atrt_scope=matrix ranks a query's weights among those of later queries, which a language model "
                            "must not see: use atrt_scope=row, or train a classifier")
        borders, factors = TASKS[o.atrt_task]
        self.borders = numbers("atrt_borders", o.atrt_borders, borders)
        self.factors = numbers("atrt_factors", o.atrt_factors, factors)
        if self.borders[0] >= self.borders[1]:
            raise UserError(f"atrt_borders must be in order, like {borders}; got {o.atrt_borders}")
        if min(self.factors) <= 0:
            raise UserError(f"atrt_factors must be above 0 (1 changes nothing), like {factors}; got {o.atrt_factors}")
        if not 0 <= o.atrt_sharpness < math.inf:
            raise UserError(f"atrt_sharpness must be at least 0, like 1.0; got {o.atrt_sharpness}")

    def statistic(self, q, k, lengths):
        """(sigma / mu)^2 of all weights of a head of an example, (B, H, T, 1), the same in each row; None in scope `row`."""
        if self.options.atrt_scope == "row":
            return None
        squares = engine.row_squares(self, q, k, lengths)
        if lengths is not None:
            there = torch.arange(q.size(2), device=q.device) < lengths[:, None]
            squares = squares.where(there[:, None, :, None], 0)
        return (squares.sum(2, keepdim=True) - 1).expand_as(squares)  # L^2 weights, L rows that sum to 1: mu = 1 / L

    @property
    def rescales(self):
        return self.options.atrt_renormalize

    def reweigh(self, p, keys, statistic=None):
        """p f, or p f / sum(p f), for rows p (..., n, m) that see `keys` (..., n, 1) keys each; f is constant to the gradient."""
        x, keys = p.detach(), keys.to(wide(p))
        if self.options.atrt_scope == "row":
            statistic = keys * torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=keys.dtype).square_() - 1
        elif statistic is None:  # p is whole, (B, H, T, T); the queries that are padding are left out
            query = torch.arange(p.size(-2), device=p.device)[:, None]
            statistic = x.to(keys.dtype).where(query < keys, 0).square().sum((2, 3), keepdim=True) - 1
        y = torch.addcmul(p, p, self.gains(x, keys, statistic))
        return y / y.sum(-1, keepdim=True) if self.rescales else y

    def gains(self, p, keys, statistic):
        """f - 1 for weights p, where statistic is (sigma / mu)^2 and mu = 1 / keys. With s = (p - mu) / sigma:

            s > high           f = top - (top - border) exp(-sharpness (s - high)^2 / 2)
            low < s <= high    f = edge + (middle - edge) (g(s) - g(low)) / (g(centre) - g(low))
            s <= low           f = 1

        g is the Gaussian of deviation WIDTH (high - low) about the middle of the moderate zone. In
        v = (high - s) / (high - low), 1 at the low border and 0 at the high one, g(s) / g(low) is
        exp(a (v - v^2)) with a = 1 / (2 WIDTH^2), and above, where v < 0, what is wanted is exp(-a (scale v)^2):
        one exponential for both. Written in few operations, without comparisons: those of bfloat16 take
        five times as long as a product on a CPU.
        """
        (low, high), (edge, middle, border, top) = self.borders, self.factors
        a, tiny = 1 / (2 * WIDTH**2), torch.finfo(statistic.dtype).eps
        c = a * math.log2(math.e)  # exp2 is faster than exp
        # s = 0 where weights differ by no more than their rounding, or that of their sums
        same = statistic <= max(torch.finfo(p.dtype).eps ** 2, 256 * tiny)
        r = statistic.masked_fill(same, math.inf).rsqrt()  # mu / sigma: s = p keys r - r
        # above a border by no more than the rounding of sigma is on it: of two keys s is always 1 or -1
        origin = r + high + 4 * tiny * (1 + r * r)
        scale = c / (high - low)
        v = (p * (keys * r * -scale).to(p.dtype)).add_((origin * scale).to(p.dtype))  # c v
        end = torch.tensor(c, dtype=p.dtype).item()  # as v has it at the low border
        F.leaky_relu_(v, (high - low) * math.sqrt(self.options.atrt_sharpness / (2 * a)))
        power = v.clamp(min=0).addcmul_(v, v, value=-1 / c).exp2_()
        k = (middle - edge) / (math.exp(a / 4) - 1)
        moderate = torch.rsub(power, edge - 1 - k, alpha=-k)
        more = torch.rsub(power, top - edge + k, alpha=top - border + k)  # of the high zone than of the moderate formula
        return between(moderate, v, -math.inf, end).add_(between(more, v, -math.inf, 0.0))


def between(x, v, low, high):
    """x where low < v < high, else 0: the gradient of hardtanh is this, in one pass."""
    return torch.ops.aten.hardtanh_backward(x, v, low, high)


def numbers(name, value, default):
    """An option's numbers, or `default` where there are none. Raises UserError unless they are as many."""
    if not value:
        return default
    if len(value) != len(default) or not all(type(x) in (int, float) and math.isfinite(x) for x in value):
        raise UserError(f"{name} expects {len(default)} numbers like {default}, or [] for those of atrt_task; got {value}")
    return value


if __name__ == "__main__":
    import plot

    plot.show_pattern("atrt")
