"""Adaptive span and periodic masking against the paper's form, closed forms and counts."""

import math

import pytest
import torch

from adaptive_attention_span import triangle_wave
from core.config import UserError
from core.mechanisms import mechanism
from model import GPT, GPTConfig


def layer(block_size=64, causal=True, n_head=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    kind, defaults = mechanism("adaptive_attention_span")
    return kind(GPTConfig(n_head=n_head, n_embd=8 * n_head, block_size=block_size, n_class=0 if causal else 2,
                          kernel="engine",
                          options={**defaults, **options})).to(dtype)


def periodic(periods, ratios, causal=True, **options):
    """A layer whose heads have the given periods and ratios."""
    made = layer(causal=causal, n_head=len(periods), use_triangle_wave_masking=True, **options)
    made.period.data = torch.logit((torch.tensor(periods, dtype=torch.float64) - made.low) / (made.high - made.low))
    made.ratio.data = torch.logit(2 * torch.tensor(ratios, dtype=torch.float64) + 0.5)
    return made


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_triangle_wave_masking": True}])
def test_multiply_and_renormalise(options, causal):
    """The paper's form, m exp(s) / sum of m exp(s) (section 2.2), outputs and all gradients."""
    made = layer(causal=causal, span_init=[5.0, 20.0, 50.0], softness_span_mask=8, **options)
    inputs = [torch.randn(2, 3, 64, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 3, 64, 8, dtype=torch.float64)

    def paper(q, k, v):
        i = torch.arange(64, dtype=torch.float64)
        d = i[:, None] - i if causal else (i[:, None] - i).abs()
        z = 64 * torch.sigmoid(made.span)
        m = ((8 + z[:, None, None] - d) / 8).clamp(0, 1)
        if options:
            p = 2 + 6 * torch.sigmoid(made.period)[:, None, None]
            o = p * (torch.sigmoid(made.ratio)[:, None, None] - 0.5) / 2
            tri = sum(8 / (math.pi * k) ** 2 * torch.cos(2 * math.pi * k * d / p) for k in (1, 3, 5))
            m = m * (p / 4 * tri + o + 0.5).clamp(0, 1)
        if causal:
            m = m * (d >= 0)
        weights = m * torch.exp(q @ k.mT / math.sqrt(8))
        return weights / weights.sum(-1, keepdim=True) @ v

    parameters = made.mask_parameters()
    assert len(parameters) == (3 if options else 1)
    found = [made.attend(*inputs)] + list(torch.autograd.grad(made.attend(*inputs), inputs + parameters, upstream))
    wanted = [paper(*inputs)] + list(torch.autograd.grad(paper(*inputs), inputs + parameters, upstream))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_gradient_at_the_ends_of_the_ramp():
    """A key exactly where the mask reaches 0, or leaves 1, has a finite gradient; at 0 it is 0."""
    made = layer(span_init=[16.0], n_head=1, softness_span_mask=8)
    made.span.data = torch.logit(torch.tensor([0.25], dtype=torch.float64))
    assert made.spans().item() == 16.0
    for distance, kept in ((24, False), (16, True), (23, True)):
        bias = made.bias_at(torch.tensor([distance]), torch.tensor([0]))
        assert (bias > -math.inf).item() is kept
        (gradient,) = torch.autograd.grad(bias.clamp(min=-1e4).sum(), made.span)
        assert math.isfinite(gradient.item()) and (gradient.item() != 0) is kept
    made.attend(*[torch.randn(1, 1, 64, 8, dtype=torch.float64) for _ in range(3)]).sum().backward()
    assert made.span.grad.isfinite().all()


def test_triangle_wave():
    """1 at 0, 0 at 1/4, -1 at 1/2, straight between; the series in closed form, and near the wave."""
    x = torch.tensor([0, 0.125, 0.25, 0.5, 0.75, 1, 2.5, -0.125], dtype=torch.float64)
    torch.testing.assert_close(triangle_wave(x), torch.tensor([1, 0.5, 0, -1, 0, 1, -1, 0.5], dtype=torch.float64))
    ends = 8 / math.pi**2 * (1 + 1 / 9 + 1 / 25)
    series = triangle_wave(torch.tensor([0, 0.25, 0.5], dtype=torch.float64), 5)
    torch.testing.assert_close(series, torch.tensor([ends, 0, -ends], dtype=torch.float64))
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (triangle_wave(x, 5) - triangle_wave(x)).abs().max() < 1 - ends + 1e-12  # the tips are farthest off
    assert (triangle_wave(x, 1) - 8 / math.pi**2 * torch.cos(2 * math.pi * x)).abs().max() < 1e-14


@pytest.mark.parametrize("harmonics", [0, 5])
def test_wave_by_hand(harmonics):
    """p = 4, r = 0: distances 0 to 4 keep 1, 1/2, 0, 1/2, 1; far away the same."""
    made = periodic([4.0], [0.0], triangle_wave_harmonics=harmonics)
    for far in (0, 4 * 10**6):
        w = made.wave(0, torch.arange(far, far + 5, dtype=torch.float64))
        torch.testing.assert_close(w, torch.tensor([1, 0.5, 0, 0.5, 1], dtype=torch.float64), rtol=0, atol=1e-7)


def test_kept_share_against_a_count():
    """1/p + 2r + 1/2 is the share of distances with w > 0, for the exact wave."""
    periods = [2.3 + math.pi / 100 * k for k in (1, 90, 170, 130, 30)]  # irrational: distances fall everywhere
    ratios = [-0.1, 0.0, -0.2, 0.13, -0.24]
    made = periodic(periods, ratios, triangle_wave_harmonics=0)
    waves = made.wave(torch.arange(len(periods))[:, None], torch.arange(200_000, dtype=torch.float64))
    counted = (waves > 0).double().mean(1)
    torch.testing.assert_close(made.kept_of_period(), counted, rtol=0, atol=1e-3)
    full = periodic([2.5], [0.2], triangle_wave_harmonics=0)  # nothing dropped: 1 + the least of w
    least = full.wave(0, torch.linspace(0, 10, 100_001, dtype=torch.float64)).min().item()
    assert full.kept_of_period().item() == pytest.approx(1 + least, abs=1e-3) and least > 0


def test_penalty():
    """span_reg times the mean of z, with periodic masking of (z + R) times the kept share; over layers a sum."""
    made = layer(span_init=[5.0, 20.0, 50.0], span_reg=0.01)
    assert made.penalty().item() == pytest.approx(0.01 * 25, rel=1e-6)
    made = periodic([4.0, 7.0], [-0.125, -0.05], span_init=[10.0, 30.0], span_reg=0.01)
    assert made.penalty().item() == pytest.approx(0.01 * (42 * 0.5 + 62 * (1 / 7 + 0.4)) / 2, rel=1e-6)
    made.penalty().backward()
    assert (made.span.grad > 0).all() and (made.ratio.grad > 0).all() and (made.period.grad < 0).all()
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=40, attention="adaptive_attention_span",
                          options={"span_reg": 0.5}))
    assert model.penalty().item() == pytest.approx(3 * 0.5 * 20)


def test_first_values():
    """Spans as given, used again over the heads, or half the longest; periods all over their range, ratio 0."""
    torch.testing.assert_close(layer(span_init=[3.0, 9.0]).spans(), torch.tensor([3.0, 9.0, 3.0], dtype=torch.float64))
    assert layer(max_span=100).spans().tolist() == pytest.approx([50] * 3)
    made = layer(n_head=64, use_triangle_wave_masking=True)
    periods, ratios = made.waves()
    made_sparse = layer(use_triangle_wave_masking=True, ratio_init_triangle_wave_masking=-0.15)
    assert made_sparse.waves()[1].tolist() == pytest.approx([-0.15] * 3)
    assert ratios.abs().max() == 0 and 2 <= periods.min() < 3 and 7 < periods.max() <= 8


def test_snapped_periods():
    """Whole periods in the formula, no gradient for them, and in the keys of a plan only kept residues."""
    made = periodic([4.2, 3.3], [-0.2, -0.2], span_init=[60.0], snap_periods=True)
    assert made.waves()[0].tolist() == [4, 3]
    (made.bias_at(torch.tensor([60]), torch.arange(61)).clamp(min=-1e4).sum()).backward()
    assert made.period.grad.abs().max() == 0 and made.ratio.grad.abs().max() > 0
    for block in (block for part in made.blocks(64) for block in part):
        (p,) = {[4, 3][h] for h in block.heads}
        assert block.queries.step == p and {(block.queries[0] - keys[0]) % p for keys in block.kv_ranges} == {0}
    unsnapped = periodic([4.2, 3.3], [-0.2, -0.2], span_init=[60.0])
    assert {block.queries.step for part in unsnapped.blocks(64) for block in part} == {1}
    long = periodic([4.2, 1e7], [-0.2, -0.2], span_init=[60.0], snap_periods=True, period_max_triangle_wave_masking=1e7)
    assert len(long.blocks(64)[0]) < 12  # a period longer than the span is nothing to skip, and costs no loop over it


def test_shapes_stay_few():
    """Spans that move a little change no block: compiled code and kernels are met again."""
    made = layer(block_size=1024, span_init=[100.0, 300.0, 700.0])
    before = made.blocks(1024)
    for part in made.span.data:
        part += 0.005  # about one position
    assert made.blocks(1024) == before
    made.span.data += 0.5
    assert made.blocks(1024) != before


@pytest.mark.parametrize("period, ratio, harmonics",
                         [(64.0, -0.249, 0), (64.0, -0.249, 5), (32.0, -0.249, 3), (16.0, -0.249, 1)])
def test_a_query_always_keeps_itself(period, ratio, harmonics):
    """With long periods and low ratios w(0) is below 0: the query's key stays, and nothing later is seen."""
    made = periodic([period], [ratio], triangle_wave_harmonics=harmonics, period_max_triangle_wave_masking=64.0,
                    span_init=[30.0])
    assert made.wave(0, torch.zeros(1, dtype=torch.float64)) >= 0
    q, k, v = torch.randn(3, 1, 1, 200, 8, dtype=torch.float64)
    before = [made.attend(q, k, v), made.weights(q, k) @ v]
    k[:, :, 150:], v[:, :, 150:] = 5.0, 100.0
    for old, new in zip(before, (made.attend(q, k, v), made.weights(q, k) @ v)):
        assert old.isfinite().all() and torch.equal(old[:, :, :150], new[:, :, :150])
    assert made.stats()["kept_share"] > 0
    i = torch.arange(200)
    assert (made.total_bias(torch.tensor(0), i, i) > -math.inf).all()


@pytest.mark.parametrize("options, said", [
    ({"span_init": [0.0]}, "above 0 and below 64"),
    ({"span_init": [64.0]}, "above 0 and below 64"),
    ({"max_span": -1}, "max_span must be at least 0"),
    ({"softness_span_mask": 0}, "softness_span_mask at least 1"),
    ({"period_min_triangle_wave_masking": 9.0}, "got 9.0 and 8.0"),
    ({"period_min_triangle_wave_masking": 0.5}, "got 0.5 and 8.0"),
    ({"ratio_init_triangle_wave_masking": -0.25}, "above -1/4 and below 1/4, got -0.25"),
    ({"max_span": 10**20}, "both at most 16,777,216"),
    ({"softness_span_mask": 10**20}, "both at most 16,777,216"),
    ({"period_max_triangle_wave_masking": 1e9}, "<= 16,777,216, got 2.0 and 1000000000.0"),
    ({"span_init": [[1]]}, r"above 0 and below 64 \(max_span\), got \[\[1\]\]"),
    ({"span_init": ["1"]}, "above 0 and below 64"),
    ({"span_init": [math.nan]}, "above 0 and below 64"),
    ({"triangle_wave_harmonics": 2}, "unknown triangle_wave_harmonics '2'"),
])
def test_refused(options, said):
    with pytest.raises(UserError, match=said):
        layer(**options)
