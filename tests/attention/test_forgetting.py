"""Forget gates beyond the laws of test_contract.py: the formula by hand, pruning, the cache, and what is refused."""

import math
import re

import pytest
import torch
from test_contract import Case, random_qkv
from training_runs import fit

import attention
import bench_pruning
import forgetting
from core import contract, flex, kvcache, tiles
from core.config import UserError
from core.mechanisms import mechanism
from core.texts import NO_TEXTS, Texts, with_gates
from helpers import call, write_bytes
from model import GPT, GPTConfig

KIND, DEFAULTS = mechanism("forgetting")


def make(causal=True, block_size=64, **options):
    return Case(KIND, {**DEFAULTS, **options}, causal).layer(block_size=block_size)


@pytest.mark.parametrize("causal", [True, False])
def test_formula(causal):
    """The score gets the sum of log f over the tokens after the earlier one, up to the later one."""
    layer, x = make(causal), torch.randn(1, 9, 24, dtype=torch.float64)
    f = torch.sigmoid(x @ layer.forget.weight.T + layer.forget_bias)  # (1, T, H)
    q, k, _ = layer.project(x)
    scores = q @ k.mT / math.sqrt(8)
    for i in range(9):
        for j in range(9):
            between = f[0, min(i, j) + 1 : max(i, j) + 1].log().sum(0)
            scores[0, :, i, j] += between if j <= i or not causal else -math.inf
    torch.testing.assert_close(layer.map(x), torch.softmax(scores, -1), rtol=1e-9, atol=1e-12)


def test_first_spans():
    """Without an input the gates of a head multiply to about 1 / e over its span; spans grow from head to head."""
    layer = make(block_size=512)
    assert layer.stats()["spans"] == pytest.approx([8, 64, 512], rel=1e-5)
    gate = layer.gate(torch.zeros(1, 512, 24, dtype=torch.float64))[0]
    assert [gate[h, : round(span)].sum().item()
            for h, span in enumerate((8, 64, 512))] == pytest.approx([-1] * 3, abs=0.07)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=512, n_head=3, n_embd=24, n_layer=2, attention="forgetting"))
    assert model.attentions()[1].stats()["spans"] == pytest.approx([8, 64, 512], rel=1e-5)  # `init_weights` leaves them


@pytest.fixture
def pairs(monkeypatch):
    """A list: the number of pairs that each tile of the engine multiplies."""
    pairs, scores = [], tiles.Tile.scores
    monkeypatch.setattr(tiles.Tile, "scores", lambda *given: pairs.append(scores(*given)) or pairs[-1])
    return lambda: sum(s.numel() for s in pairs) + (pairs.clear() or 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gates", ["random", "trained", "steady"])
def test_pruned_is_close_and_multiplies_less(causal, gates, pairs):
    """Outputs and gradients are within 1e-4 of those of all pairs, many of which are left out, also amid documents."""
    layer, T = make(causal, 1024, forgetting_spans=[2.0, 30.0, 1000.0]), 1024
    x = torch.randn(1, T, 24, dtype=torch.float64)
    if gates == "trained":  # most tokens keep all, some forget all
        layer.forget.weight.data *= 8
        layer.forget_bias.data += 4
    elif gates == "steady":
        layer.forget.weight.data.zero_()
    decay = with_gates(layer, x, NO_TEXTS).decay.detach().requires_grad_()
    q, k, v = inputs = [x.detach().requires_grad_() for x in random_qkv(T, B=1)]
    documents = torch.arange(T)[None] // 300 * 300
    for texts in (NO_TEXTS, Texts(documents=documents)):
        results, counts = [], []
        for prune in (True, False):
            layer.options.forgetting_prune = prune
            y = layer.attend(q, k, v, texts._replace(decay=decay))
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
            results.append([y, *torch.autograd.grad(y, [*inputs, decay], upstream)])
            counts.append(pairs())
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(*results))
        assert counts[0] < (0.85 if texts.documents is None else 0.97) * counts[1], counts


def test_pruned_blocks_of_flex():
    """FlexAttention's mask leaves out the same blocks, per head, and what it computes stays within 1e-4."""
    layer, T = make(block_size=1024, forgetting_spans=[2.0, 30.0, 1000.0]), 1024
    decay = with_gates(layer, torch.randn(2, T, 24, dtype=torch.float64), NO_TEXTS).decay.detach()
    q, k, v = (x.detach() for x in random_qkv(T))
    texts = Texts(decay=decay, least=layer.least_decay(q, k))
    cells = flex.cells_of(layer, T, "cpu")[None] & flex.cells_of_texts(texts, True)
    assert cells.shape == (2, 3, 8, 8) and cells[:, 2].sum() == 2 * 36 and cells[:, 0].sum() < 2 * 20
    first, _ = texts.key_limits(True)
    i = torch.arange(T)
    needed = (i >= first[..., None]) & (i <= i[:, None])
    assert not (needed & ~cells[:, :, i[:, None] // flex.BLOCK, i // flex.BLOCK]).any()
    with contract.flex_on_cpu(), torch.no_grad():
        assert (flex.attend(layer, q, k, v, texts) - layer.weights(q, k, texts=texts) @ v).abs().max() < 1e-4


def test_the_cache_holds_one_number_a_key():
    layer = make(block_size=16)
    cache, dense = kvcache.Cache(16), kvcache.Cache(16)
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        for t in range(40):
            layer(x[:, t : t + 1], cache=cache)
        Case(attention.Attention, {}, True).layer()(x[:, :1], cache=dense)
    assert cache.rings[2].shape == (2, 3, 16) and len(dense.rings) == 2
    torch.testing.assert_close(cache.last_decay()[..., 0], layer.gate(x).sum(-1))


def test_far_sums_stay_exact():
    """In float32, after a long text, near pairs are as exact as at its beginning."""
    layer = make(block_size=64).float()
    q, k, v = (x.detach().float() for x in random_qkv(64))
    gate = -torch.rand(2, 3, 64)
    near, far = (layer.attend(q, k, v, Texts(decay=(gate.double().cumsum(-1) - start).float())) for start in (0, 4000))
    assert (near - far).abs().max() < 2e-3 and not torch.equal(near, far)


@pytest.mark.parametrize("gate, said", [
    (lambda x: x[..., :3].transpose(1, 2), "at most 0"),
    (lambda x: -x.abs(), r"one number for each head and token, \(2, 3, 8\)"),
    (lambda x: -x[..., :3].abs().cumsum(1).transpose(1, 2), "depends on other tokens"),
])
def test_gates_are_checked(gate, said):
    kind = type("Wrong", (attention.Attention,), {"gate": lambda self, x: gate(x)})
    with pytest.raises(UserError, match=f"wrong: gate.*{said}"):
        contract.check(Case(kind, {}, True).layer(), "wrong")


@pytest.mark.parametrize("spans", [[1.0], [8, "9"], [0]])
def test_spans_are_checked(spans):
    with pytest.raises(UserError, match="forgetting_spans expects spans above 1 token"):
        make(forgetting_spans=spans)


def test_what_pruning_saves(quick, refused, tmp_path, capsys):
    """A line for each T, of a run that has gates and enough text."""
    data = write_bytes(tmp_path / "data", train="import this " * 200, val="import that " * 100)
    fit(tmp_path / "run", data, "--attention=forgetting", "--max_iters=1", "--forgetting_spans=[2,2]")
    capsys.readouterr()
    call(bench_pruning, f"--out_dir={tmp_path / 'run'}", "--longest=1024")
    line = capsys.readouterr().out
    share, difference = re.fullmatch(r"T = 1,024: (\d+)% of .* left out, .* with pruning; logits differ by (.*)\n",
                                     line).groups()
    assert 50 < int(share) < 100 and float(difference) < 1e-4
    assert "expected more than 2,048 tokens in the val" in refused(bench_pruning, f"--out_dir={tmp_path / 'run'}")
    fit(tmp_path / "dense", data, "--max_iters=1")
    said = refused(bench_pruning, f"--out_dir={tmp_path / 'dense'}")
    assert "expected a run with --attention=forgetting, got dense" in said


def test_dense_has_no_gates():
    assert make().gates and not make().dense and not Case(attention.Attention, {}, True).layer().gates
    assert forgetting.spread(8, 8, 1) == [8]
