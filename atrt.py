"""Attention that raises its own large weights: adaptive token ranking and transformation (ATRT).

A softmax weight a is ranked by s = (a - mu) / sigma, with the mean and the standard deviation of
the weights it stands among, and multiplied by a factor that depends on s alone (`Attention.factor`).
Bias and blocks are those of dense attention. `python attention.py atrt` draws it.

Letters: B batch, T time, H heads; n queries, m keys.
"""

import math

import torch
import torch.nn.functional as F

import attention
from core.config import UserError, check_choice
from core.ops import accumulate_dtype

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
LARGEST = 1e4  # of borders, factors and the sharpness: beyond any use, and safe in float32
PIECE = 2**19  # elements at a time, on a CPU: their float32 copies fit its cache, and starting operations costs little


class Attention(attention.Attention):
    """Dense attention whose weights are ranked, and the larger ones raised, before they meet the values."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        o = self.options
        check_choice("atrt_scope", o.atrt_scope, ("row", "matrix"))
        check_choice("atrt_task", o.atrt_task, TASKS)
        if o.atrt_scope == "matrix" and self.causal:
            raise UserError("atrt_scope=matrix ranks a query's weights among those of later queries, which a language model "
                            "must not see: use atrt_scope=row, or train a classifier")
        borders, factors = TASKS[o.atrt_task]
        self.borders = numbers("atrt_borders", o.atrt_borders, borders)
        self.factors = numbers("atrt_factors", o.atrt_factors, factors)
        if self.borders[0] >= self.borders[1]:
            raise UserError(f"atrt_borders must be in order, like {borders}; got {o.atrt_borders}")
        if max(map(abs, self.borders)) > LARGEST or self.borders[1] - self.borders[0] < 1 / LARGEST:
            raise UserError(f"atrt_borders must lie within {LARGEST:,.0f} of 0 and apart, like {borders}; got {o.atrt_borders}")
        if not 1 / LARGEST <= min(self.factors) <= max(self.factors) <= LARGEST:
            raise UserError(f"atrt_factors must be above 0 (1 changes nothing) and at most {LARGEST:,.0f}, like {factors}; "
                            f"got {o.atrt_factors}")
        if not 0 <= o.atrt_sharpness <= LARGEST:
            raise UserError(f"atrt_sharpness must be from 0 to {LARGEST:,.0f}, like 1.0; got {o.atrt_sharpness}")
        self.scope, self.renormalize = o.atrt_scope, o.atrt_renormalize

    def factor(self, p, keys, variation):
        """With s = (p - mu) / sigma, mu = 1 / keys, (sigma / mu)^2 = variation, and the borders low and high:

            s > high           f = top - (top - border) exp(-sharpness (s - high)^2 / 2)
            low < s <= high    f = edge + (middle - edge) (g(s) - g(low)) / (g(centre) - g(low))
            s <= low           f = 1

        g is the Gaussian of deviation WIDTH (high - low) about the centre of the moderate zone.
        """
        (low, high), (edge, middle, border, top) = self.borders, self.factors
        tiny = torch.finfo(p.dtype).eps
        # s = 0 where weights differ by no more than the rounding of their sums; then no weight is above another
        s = torch.where(variation > 16 * tiny, (p * keys - 1) * variation.clamp(min=16 * tiny).rsqrt(), 0)

        def g(s):
            return torch.exp(-((s - (low + high) / 2) ** 2) / (2 * (WIDTH * (high - low)) ** 2))

        g_low = math.exp(-1 / (8 * WIDTH**2))
        moderate = edge + (middle - edge) * (g(s) - g_low) / (1 - g_low)
        raised = top - (top - border) * torch.exp(-self.options.atrt_sharpness * (s - high) ** 2 / 2)
        # s above a border by no more than its own rounding is on it: of two keys s is always 1 or -1
        rounding = 4 * tiny * (1 + 1 / variation.clamp(min=16 * tiny))
        return torch.where(s > high + rounding, raised, torch.where(s > low, moderate, 1))

    def reweigh(self, p, keys, variation=None):
        """p f / sum(p f), or p f, as `attention.Attention.reweigh` computes it, in fewer passes over the weights."""
        if not (torch.is_grad_enabled() and p.requires_grad):
            return self.raised(p, keys, variation)
        y = p * self.raised(p.detach(), keys, variation, factors=True)
        return y / y.sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny) if self.renormalize else y

    def raised(self, p, keys, variation=None, factors=False):
        """`reweigh` of p, or the factors alone, computed in float32, some rows at a time."""
        out, rows, m = p.new_empty(p.shape), p.reshape(-1, p.size(-1)), p.size(-1)
        keys = keys.clamp(min=1)  # where padding sees nothing
        keys, variation = (x if x is None else x.to(accumulate_dtype(p)).expand(*p.shape[:-1], 1).reshape(-1, 1) for x in (keys, variation))
        n = min(len(rows), max(1, (PIECE if p.device.type == "cpu" else 128 * PIECE) // m))
        room = [p.new_empty(n, m, dtype=accumulate_dtype(p)) for _ in range(5)]  # once: touching new memory costs more than computing
        for a in range(0, len(rows), n):
            some = slice(a, a + n)
            x, gain, *spare = (part[: len(rows[some])] for part in room)
            x.copy_(rows[some])
            self.gains(x, keys[some], None if variation is None else variation[some], torch.finfo(p.dtype).eps, gain, *spare)
            if factors:
                y = gain.add_(1)
            else:
                y = torch.addcmul(x, x, gain, out=spare[0])
                if self.renormalize:
                    y *= y.sum(-1, keepdim=True).clamp_(min=torch.finfo(y.dtype).tiny).reciprocal_()
            out.view(-1, m)[some] = y
        return out

    def gains(self, x, keys, variation, precision, gain, v, above, high_gain):
        """`factor` - 1 for weights x (n, m), into `gain`; the other tensors are scratch. One exponential serves both zones:
        v = (high - s) / (high - low) is 1 at the low border and 0 at the high one, where g(s) / g(low) =
        exp(a (v - v^2)) with a = 1 / (2 WIDTH^2); above, v < 0, it is exp(-a (slope v)^2).
        """
        (low, high), (edge, middle, border, top) = self.borders, self.factors
        a, tiny = 1 / (2 * WIDTH**2), torch.finfo(x.dtype).eps
        if variation is None:
            total, squares = x.sum(-1, keepdim=True), torch.square(x, out=v).sum(-1, keepdim=True)
            total.clamp_(min=0.1)  # 0 in rows of padding, else near 1
            mu, variation = total / keys, (squares * keys).div_(total.square()).sub_(1)
        else:
            mu = 1 / keys
        # s = 0 where weights differ by no more than their own rounding, or than that of their sums.
        same = variation <= max(precision**2, 16 * tiny)
        c = a * math.log2(math.e) / (high - low)  # exp2 takes a third of the time of exp
        r = variation.masked_fill(same, math.inf).rsqrt_().mul_(-c)  # -c mu / sigma
        torch.sub(x, mu, out=v).mul_(r / mu).add_(c * high)  # c (high - s), from here on called v
        # s above the border by no more than the rounding of sigma is on it: of two keys s is always 1 or -1.
        torch.lt(v, (r * r).add_(c * c).mul_(-4 * tiny / c), out=above)
        F.leaky_relu_(v, (high - low) * math.sqrt(self.options.atrt_sharpness / (2 * a)))
        end = c * (high - low)
        power = torch.clamp(v, min=0, out=gain).addcmul_(v, v, value=-1 / end).exp2_()
        k = (middle - edge) / (math.exp(a / 4) - 1)
        torch.add(x.new_full((), top - 1), power, alpha=border - top, out=high_gain)
        torch.add(x.new_full((), edge - 1 - k), power, alpha=k, out=gain).lerp_(high_gain, above)
        torch.ops.aten.hardtanh_backward.grad_input(gain, v, -math.inf, end, grad_input=gain)  # 0 from `end` on


def numbers(name, value, default):
    """An option's numbers, or `default` where there are none. Raises UserError unless they are as many."""
    if not value:
        return default
    if len(value) != len(default) or not all(type(x) in (int, float) and math.isfinite(x) for x in value):
        raise UserError(f"{name} expects {len(default)} numbers like {default}, or [] for those of atrt_task; got {value}")
    return value
