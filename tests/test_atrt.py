"""ATRT's factors against the formula written out, at borders, for rows that vary in nothing, and per matrix."""

import math

import pytest
import torch

from configurator import UserError
from model import GPTConfig, mechanism

TASKS = {"classification": (0.0, 1.5, 1.10, 1.15, 1.25, 1.30), "summarization": (0.0, 1.0, 1.08, 1.12, 1.15, 1.20)}


def layer(causal=False, dtype=torch.float64, **options):
    torch.manual_seed(0)
    kind, defaults = mechanism("atrt")
    return kind(GPTConfig(n_head=3, n_embd=24, block_size=64, n_class=0 if causal else 2, kernel="engine",
                          options={**defaults, **options})).to(dtype)


def factor(s, task="classification"):
    """The table of zones, as it is written: s a tensor of ranks."""
    low, high, edge, middle, border, top = TASKS[task]
    deviation, centre = 0.2 * (high - low), (low + high) / 2

    def g(x):
        return math.exp(-((x - centre) ** 2) / (2 * deviation**2))

    def one(s):
        if s > high:
            return border + (top - border) * (1 - math.exp(-((s - high) ** 2) / 2))
        if s > low:
            return edge + (middle - edge) * (g(s) - g(low)) / (g(centre) - g(low))
        return 1.0

    return torch.tensor([one(x) for x in s.flatten().tolist()], dtype=s.dtype).view(s.shape)


def ranked(p, mu, sigma):
    return torch.where(sigma > 0, (p - mu) / sigma, 0 * p)


def by_rows(p, task="classification", renormalize=True):
    """Rows of a full (n, m) matrix of weights, each ranked among its own."""
    s = ranked(p, p.mean(-1, keepdim=True), p.std(-1, correction=0, keepdim=True))
    y = p * factor(s, task)
    return y / y.sum(-1, keepdim=True) if renormalize else y


def rows(n, m, spread=1.5):
    return torch.softmax(spread * torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m)), -1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_the_formula(task, renormalize):
    made = layer(atrt_task=task, atrt_renormalize=renormalize)
    for n, m in ((1, 3), (7, 5), (40, 64), (3, 1000)):
        p = rows(n, m)
        found = made.reweigh(p, torch.full((n, 1), m))
        torch.testing.assert_close(found, by_rows(p, task, renormalize), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("task", TASKS)
def test_zones_at_their_borders(task):
    """Factors at chosen ranks, from weights that have exactly these."""
    made = layer(atrt_task=task)
    low, high, edge, middle, border, top = TASKS[task]
    s = torch.tensor([[-3.0, -1e-6, 0.0, 1e-6, (low + high) / 2, high - 1e-6, high, high + 1e-6, 9.0]], dtype=torch.float64)
    wanted = torch.tensor([[1, 1, 1, edge, middle, edge, edge, border, top]], dtype=torch.float64)
    keys, variation = torch.full((1, 1), 100.0, dtype=torch.float64), torch.full((1, 1), 0.04, dtype=torch.float64)
    p = (1 + 0.2 * s) / 100  # mu = 1 / 100, sigma = 0.2 mu
    torch.testing.assert_close(1 + made.gains(p, keys, variation), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(factor(s, task), wanted, rtol=0, atol=1e-6)


def test_own_borders_factors_and_sharpness():
    made = layer(atrt_borders=[0.5, 2.5], atrt_factors=[2.0, 3.0, 4.0, 5.0], atrt_sharpness=2.0, atrt_renormalize=False)
    p = torch.tensor([[1 + 0.2 * s for s in (0.4, 0.6, 1.5, 3.5)]], dtype=torch.float64) / 100
    gains = made.gains(p, torch.full((1, 1), 100.0), torch.full((1, 1), 0.04, dtype=torch.float64))[0].tolist()
    assert gains[0] == 0 and 1 < gains[1] < 1.3 and gains[2] == pytest.approx(2, abs=1e-9)
    assert gains[3] == pytest.approx(4 - math.exp(-1), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_vary_in_nothing(dtype):
    """Constant rows and single keys have sigma = 0: every factor is 1. So with masked keys beside them."""
    made = layer(atrt_renormalize=False)
    for m in (1, 2, 3, 7, 48, 1000, 4096):
        p = torch.softmax(torch.full((2, m), 0.3, dtype=dtype), -1)
        assert torch.equal(made.reweigh(p, torch.full((2, 1), m)), p), m
        beside = torch.cat([p, torch.zeros_like(p)], 1)
        assert torch.equal(made.reweigh(beside, torch.full((2, 1), m)), beside), m


def test_two_keys():
    """Of two keys the larger is one deviation above the mean, whatever they are."""
    for task, wanted in (("classification", None), ("summarization", 1.08)):  # there it is on the border, not above
        made = layer(atrt_task=task, atrt_renormalize=False)
        p = torch.rand(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.49
        p = torch.cat([p, 1 - p], 1)
        factors = made.reweigh(p, torch.full((500, 1), 2)) / p
        expected = factor(torch.tensor([1.0], dtype=torch.float64), task).item() if wanted is None else wanted
        wanted = torch.tensor([[1.0, expected]], dtype=torch.float64).expand(500, 2)
        torch.testing.assert_close(factors, wanted, rtol=1e-6, atol=0)


def test_masked_keys_do_not_count():
    """A causal row is ranked among the keys it sees."""
    made, p = layer(causal=True), torch.zeros(20, 20, dtype=torch.float64)
    for n in range(20):
        p[n, : n + 1] = rows(1, n + 1)[0]
    found = made.reweigh(p, torch.arange(1, 21)[:, None])
    for n in range(20):
        torch.testing.assert_close(found[n : n + 1, : n + 1], by_rows(p[n : n + 1, : n + 1]), rtol=1e-12, atol=1e-15)
    assert found.triu(1).abs().max() == 0


@pytest.mark.parametrize("kernel", ["engine", "reference"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_padding_and_scope(scope, kernel):
    """Each example alone: its own tokens' weights, by rows or all of a head's together; long padding changes nothing."""
    made, T, lengths = layer(atrt_scope=scope), 60, [60, 9, 2, 1]
    made.kernel = kernel
    q, k, v = torch.randn(3, 4, 3, T, 8, dtype=torch.float64)
    found = made.attend(q, k, v, torch.tensor(lengths))
    for n, length in enumerate(lengths):
        for h in range(3):
            p = torch.softmax(q[n, h, :length] @ k[n, h, :length].mT / math.sqrt(8), -1)
            if scope == "row":
                y = by_rows(p)
            else:
                y = p * factor(ranked(p, p.mean(), p.std(correction=0)))
                y = y / y.sum(-1, keepdim=True)
            torch.testing.assert_close(found[n, h, :length], y @ v[n, h, :length], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("renormalize", [True, False])
def test_factors_are_constants_to_the_gradient(renormalize):
    """The gradient is that of p f / sum(p f), or p f, with f as it is."""
    made, p = layer(atrt_renormalize=renormalize), rows(6, 30).requires_grad_()
    keys, upstream = torch.full((6, 1), 30), torch.randn(6, 30, dtype=torch.float64)
    f = 1 + made.gains(p.detach(), keys.double(), 30 * p.detach().square().sum(-1, keepdim=True) - 1)
    wanted = p * f
    wanted = wanted / wanted.sum(-1, keepdim=True) if renormalize else wanted
    (expected,) = torch.autograd.grad(wanted, p, upstream)
    (found,) = torch.autograd.grad(made.reweigh(p, keys), p, upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """No worse than twice the formula computed in that precision."""
    made, p = layer(), rows(200, 300)
    keys = torch.full((200, 1), 300)

    def plain(p):
        mu, sigma = p.mean(-1, keepdim=True), p.std(-1, correction=0, keepdim=True)
        y = p * factor((p - mu) / sigma).to(p.dtype)
        return y / y.sum(-1, keepdim=True)

    low = p.to(dtype)
    true = by_rows(low.double())
    ours, theirs = ((x.double() - true).norm() for x in (made.reweigh(low, keys), plain(low)))
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("causal, options, said", [
    (True, {"atrt_scope": "matrix"}, "use atrt_scope=row, or train a classifier"),
    (False, {"atrt_scope": "column"}, "unknown atrt_scope 'column'; there are matrix, row"),
    (False, {"atrt_task": "classify"}, "did you mean classification"),
    (False, {"atrt_borders": [1.5, 0.0]}, "must be in order"),
    (False, {"atrt_borders": [1.5]}, r"expects 2 numbers like \[0.0, 1.5\]"),
    (False, {"atrt_borders": ["a", "b"]}, "expects 2 numbers"),
    (False, {"atrt_factors": [1.0, 1.1, 0.0, 1.2]}, "must be above 0"),
    (False, {"atrt_sharpness": -1.0}, "must be at least 0"),
])
def test_refused(causal, options, said):
    with pytest.raises(UserError, match=said):
        layer(causal, **options)
