"""The benchmark runs, measures what it says, and refuses what it cannot measure."""

import json
import math
import time

import pytest
import torch

import bench
import forgetting
from core import hardware, timing
from core.config import UserError
from helpers import call

PEER = '''
"""A peer with nanoGPT's interface."""
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        print("what a peer says about itself is not printed")

    def forward(self, x, y):
        logits = self.table(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def generate(self, idx, tokens, temperature, top_k):
        return torch.cat([idx] + [self.table(idx[:, -1:]).argmax(-1)] * tokens, 1)
'''


@pytest.fixture
def peer(tmp_path):
    (tmp_path / "model.py").write_text(PEER, "utf-8")
    return tmp_path


TINY = ["--repeat=2", "--dtype=float32"]
SMALL = [*TINY, "--n_layer=2", "--n_head=2", "--n_embd=16", "--vocab_size=11"]
SPANS = "adaptive_attention_span span_init=[3,20]"


@pytest.fixture
def settings(monkeypatch):
    """A function that sets the script's settings for this test."""
    return lambda **values: [monkeypatch.setattr(bench, name, value) for name, value in values.items()]


def tables(out):
    """The Markdown tables in what was printed: of each its rows, {column: cell}."""
    found = []
    for text in out.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                 if line.startswith("|")]
        if lines:
            assert all(len(line) == len(lines[0]) for line in lines)
            found.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return found


def measured(capsys, tmp_path, *arguments):
    """(the tables printed, the figures saved) of a call of the script."""
    file = tmp_path / "figures.json"
    assert call(bench, *arguments, f"--results={file}") in (None, 0)
    return tables(capsys.readouterr().out), json.loads(file.read_text("utf-8"))


def test_attention(capsys, tmp_path, settings):
    settings(device="cpu")
    (table,), saved = measured(capsys, tmp_path, "attention", '--shapes=["1x2x64", "2x1x100"]', "--head_size=8", *TINY,
                               '--mechanisms=["dense", "sparse window=10", "sparse local"]')
    labels = ["dense", "sparse window=10", "sparse local"]
    assert [(row["batch x heads x time"], row["attention"]) for row in table] == [
        (shape, label) for shape in ("1x2x64", "2x1x100") for label in labels]
    assert saved["machine"]["torch"] and saved["matmul_gflops"] > 0 and saved["growth"] == []
    dense, window, wider = saved["rows"][3:]
    assert dense["pairs kept"] == 100 * 101 / 2 / 100**2 and window["pairs kept"] == (100 * 10 - 45) / 100**2
    for row in dense, window, wider:
        layer = bench.parse(row["attention"]).model(n_layer=1, n_head=1, n_embd=8, block_size=100).layers[0].attention
        assert row["pairs kept"] < row["pairs multiplied"] == layer.multiplied_pairs(100) / 100**2 <= 1
        assert list(row) == list(table[0]) and row["repeats"] == 2
        assert row["fused call, ms"] == dense["fused call, ms"]  # one run for all
        assert row["times as fast"] == pytest.approx(row["fused call, ms"] / row["ms"])
        assert row["GFLOP/s"] == pytest.approx(12 * 8 * row["pairs kept"] * 100**2 * 2 / row["ms"] / 1e6)
    options = saved["mechanisms"]
    assert options["sparse window=10"]["window"] == 10 and options["sparse local"]["window"] == 256
    assert options["sparse local"]["attention"] == "sparse"
    assert options["dense"] == {"attention": "dense", "kernel": "auto"}


def test_attention_computes_gates(capsys, tmp_path, quick, monkeypatch):
    gated = []
    gate = forgetting.Attention.gate
    monkeypatch.setattr(forgetting.Attention, "gate", lambda layer, x: gated.append(x.shape) or gate(layer, x))
    measured(capsys, tmp_path, "attention", '--shapes=["2x3x20"]', "--head_size=8", *TINY,
             '--mechanisms=["dense", "forgetting"]')
    assert (2, 20, 24) in gated  # others are of the checks of a new model


def test_one_mechanism(capsys, tmp_path, monkeypatch, quick):
    """--attention=NAME with its options is that one alone, in both directions where it is not causal, as is the fused
    call."""
    fused, causal = bench.F.scaled_dot_product_attention, []
    monkeypatch.setattr(bench.F,
                        "scaled_dot_product_attention", lambda *x, is_causal: causal.append(is_causal) or fused(*x))
    (table,), saved = measured(capsys, tmp_path, "attention", "--attention=sparse", "--window=9", "--causal=False",
                               '--shapes=["1x1x50"]', "--head_size=8", *TINY)
    assert [row["attention"] for row in table] == ["sparse"] and set(causal) == {False}
    assert saved["rows"][0]["pairs kept"] == (50 * 17 - 2 * 36) / 50**2 and saved["mechanisms"]["sparse"]["window"] == 9


def test_backward_reaches_the_mask(monkeypatch, settings, quick):
    """The gradients that are measured are those of q, k, v and of the mechanism's own parameters."""
    seen, grad = [], torch.autograd.grad
    settings(device="cpu", dtype="float32", head_size=8,
             side_by_side=lambda calls: [call() or timing.Cost(1.0, 1, 1) for call in calls])
    rows = [bench.parse(text) for text in (f"{SPANS} use_triangle_wave_masking=True", "dense")]
    monkeypatch.setattr(torch.autograd, "grad", lambda y, inputs, *more, **how: (
        seen.append([tuple(x.shape) for x in inputs]) or grad(y, inputs, *more, **how)))
    bench.bench_attention(rows, 1, 2, 40)
    qkv = [(1, 2, 40, 8)] * 3
    seen = [shapes for shapes in seen if qkv[0] in shapes]  # the check of a new model takes gradients, too
    assert seen[0] == qkv + [(2,)] * 3 and seen[-2:] == [qkv, qkv]  # span, period and ratio; dense and the fused call


def test_growth():
    """The exponents are those that made the figures, for each batch and heads with three T or more."""
    def row(shape, T):
        return {"attention": "a", "batch x heads x time": f"{shape}x{T}", "ms": 3 * T**1.5, "fused call, ms": T**2.0,
                "pairs kept": 7 * T**1.25 / T**2, "pairs multiplied": 0.5, "MiB more": 2.0 * T, "fused, MiB more": None}

    found = timing.growth([row("1x8", T) for T in (64, 128, 512)] + [row("2x1", T) for T in (64, 128)])
    assert [(line["growth"], line["batch x heads"]) for line in found] == [("a", "1x8"), ("fused call", "1x8")]
    assert list(found[0].values())[2:] == pytest.approx([1.5, 1.25, 2, 1])
    assert list(found[1].values())[2:] == [pytest.approx(2), None, None, None]


def test_growth_is_printed(capsys, tmp_path, quick):
    printed, saved = measured(capsys, tmp_path, "attention", '--shapes=["1x1x32", "1x1x64", "1x1x128"]',
                              "--head_size=8", *TINY,
                              '--mechanisms=["sparse window=8", "dense"]')
    assert [row["growth"] for row in printed[1]] == ["sparse window=8", "dense", "fused call"]
    window, dense, fused = saved["growth"]
    assert window["pairs kept ~ T^"] < 1.1 and dense["pairs kept ~ T^"] > 1.9 and fused["pairs kept ~ T^"] is None
    assert [f"{row['time ~ T^']:.2f}" for row in saved["growth"]] == [row["time ~ T^"] for row in printed[1]]


def test_mechanisms_are_typed_as_on_the_command_line(settings):
    settings(device="cpu")
    row = bench.parse("adaptive_attention_span span_init=[3, 20] period_max_triangle_wave_masking=4  snap_periods=true "
                      "kernel=reference")
    assert row.attention == "adaptive_attention_span" and row.kernel == "reference" and "kernel" not in row.options
    assert row.options == {"span_init": [3, 20], "period_max_triangle_wave_masking": 4.0, "snap_periods": True}
    assert type(row.options["period_max_triangle_wave_masking"]) is float
    assert bench.parse("dense") == ("dense", "dense", "auto", 0, {})
    grouped = bench.parse("dense n_kv_head=2 kernel=engine")
    assert grouped == ("dense n_kv_head=2 kernel=engine", "dense", "engine", 2, {})
    assert bench.ours(grouped, 8).config.n_kv_head == 2


def test_the_table_of_the_issue():
    """Every mechanism stands in the table, and what has a short name can be built."""
    assert {bench.parse(text).attention for text in bench.ROWS["attention"]} == {
        "dense", "sparse", "adaptive_attention_span", "atrt", "alibi", "forgetting"}
    assert sum(bench.parse("adaptive span").options["span_init"]) == 8 * 256
    for text in bench.NAMES:
        assert " " in text  # no name of a file
        bench.parse(text)


@pytest.mark.parametrize("spans", [[3.3, 20.7], [0.5, 39.5]])
def test_masked_form_is_the_layer(settings, spans):
    """The peer of `layer` computes what the mechanism does: outputs and all gradients. (No whole spans: a ramp
    that ends on a key has two slopes there.)"""
    settings(device="cpu")
    model = bench.parse(f"{SPANS} softness_span_mask=8 use_triangle_wave_masking=True").model(
        "reference", n_layer=1, n_head=2, n_embd=16, block_size=40).double()
    layer, rotation = model.layers[0].attention, model.position_table(40).double()
    with torch.no_grad():
        layer.span.copy_(torch.logit(torch.tensor(spans) / 40))
        layer.ratio.copy_(torch.tensor([0.5, -1.0]))
    x, g = torch.randn(2, 3, 40, 16, dtype=torch.float64).unbind(0)
    wanted = [x.clone().requires_grad_(), *layer.parameters()]
    ours, theirs = layer(wanted[0], rotation), bench.masked(layer, wanted[0], rotation)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-9)
    for a, b in zip(torch.autograd.grad(theirs, wanted, g), torch.autograd.grad(ours, wanted, g)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_layer(capsys, tmp_path, quick):
    (table,), saved = measured(capsys, tmp_path, "layer", '--shapes=["2x8x64"]', "--head_size=8", *TINY)
    assert [row["layer"] for row in table] == bench.ROWS["layer"] + ["masked T x T, float32"]
    assert saved["mechanisms"]["adaptive span, period 4, snapped"]["snap_periods"] is True
    *rows, slow = saved["rows"]
    for row in rows:
        assert row["times masked"] == pytest.approx(slow["ms"] / row["ms"])
        assert row["forward, times masked"] == pytest.approx(slow["forward, ms"] / row["forward, ms"])


def test_layer_measures_both_passes(settings, quick):
    """First all that train, then the forward passes alone, which keep nothing for a backward pass."""
    taken = []
    settings(device="cpu", dtype="float32", head_size=8, side_by_side=lambda calls: [
        taken.append(call()) or timing.Cost(float(n + 1), 2**20 * n, 3) for n, call in enumerate(calls)])
    rows = bench.bench_layer([bench.parse("dense"), bench.parse(SPANS)], 1, 2, 30)
    assert [row["ms"] for row in rows] == [1e3, 2e3, 3e3] and [row["forward, ms"] for row in rows] == [4e3, 5e3, 6e3]
    assert [row["MiB more"] for row in rows] == [0, 1, 2] and [row["times masked"] for row in rows] == [3, 1.5, 1]
    assert taken[:3] == [None] * 3 and all(y.shape == (1, 30, 16) and not y.requires_grad for y in taken[3:])


def test_step(capsys, tmp_path, peer):
    (table,), saved = measured(capsys, tmp_path, "step", "--batch_size=2", "--block_size=32", f"--peer={peer}", *SMALL)
    dense, other = table
    assert dense["step"] == "dense" and other["step"] == "nanoGPT, float32"
    assert float(other["times nanoGPT, float32"]) == 1.0
    here, there = saved["rows"]
    assert here["times nanoGPT, float32"] == pytest.approx(there["ms"] / here["ms"])
    assert here["GFLOP/s"] * here["ms"] == pytest.approx(there["GFLOP/s"] * there["ms"])  # the same work


def test_step_of_mechanisms(capsys, tmp_path, monkeypatch, quick):
    """A row each, and the mechanisms' term of the loss is in the step."""
    added = []
    monkeypatch.setattr("model.GPT.penalty", lambda self: added.append(self.config.attention) or 0.0)
    (table,), saved = measured(capsys, tmp_path, "step", "--batch_size=2", "--block_size=48", *SMALL,
                               f'--mechanisms=["{SPANS}", "dense"]')
    assert [row["step"] for row in table] == [SPANS, "dense"] and set(added) == {"adaptive_attention_span", "dense"}
    assert len(added) == 2 * (2 + 2 * 2)  # two rounds that are not timed
    spans, dense = saved["rows"]
    assert spans["times dense"] == pytest.approx(spans["tokens/s"] / dense["tokens/s"]) and dense["times dense"] == 1


def test_sample(capsys, tmp_path, peer, quick):
    (table,), saved = measured(capsys, tmp_path, "sample", "--contexts=[16, 24]", "--tokens=16", f"--peer={peer}",
                               *SMALL,
                               '--mechanisms=["dense", "sparse window=5"]')
    assert [(row["sample"], row["context"]) for row in table] == [
        (name, context) for context in ("16", "24") for name in ("dense", "sparse window=5", "nanoGPT")]
    dense, window, other = saved["rows"][3:]
    keys = 2 * 2 * 16 * 4 / 2**20  # MiB of a position: layers, keys and values, width, bytes
    assert 24 * keys <= dense["cache, MiB"] <= 1.2 * 24 * keys and 5 * keys <= window["cache, MiB"] <= 1.2 * 5 * keys
    assert (dense["keys read"], window["keys read"], other["keys read"], other["cache, MiB"]) == (24, 5, None, None)
    assert window["times dense"] == pytest.approx(window["tokens/s"] / dense["tokens/s"])
    assert other["times nanoGPT"] == 1


def test_sample_counts_its_tokens(settings, peer, quick):
    """In one call a token for each that is counted; the peer draws a sixteenth of them."""
    drawn = []
    settings(device="cpu", dtype="float32", n_layer=1, n_head=1, n_embd=8, vocab_size=11, tokens=32, peer=str(peer),
             side_by_side=lambda calls: [drawn.append(call()) or timing.Cost(2.0, 0, 1) for call in calls])
    ours, theirs = bench.bench_sample([bench.parse("dense")], 12)
    assert len(drawn[0]) == 32 and drawn[1].shape == (1, 12 + 2)
    assert (ours["tokens/s"], theirs["tokens/s"]) == (16, 1)


@pytest.mark.parametrize("arguments, says", [
    ([], "unknown benchmark ''; there are attention, layer, load, ranks, sample, step"),
    (["steps"], "unknown benchmark 'steps'; did you mean step"),
    (["attention", '--shapes=["1x2"]'], "expected BATCHxHEADSxTIME"),
    (["attention", "--shapes=[128]"], "expected BATCHxHEADSxTIME"),
    (["layer", '--shapes=["1x0x16"]'], "expected BATCHxHEADSxTIME"),
    (["sample", "--contexts=[0]"], "contexts: expected numbers of tokens"),
    (["attention", "--attention=spars"], "unknown attention 'spars'"),
    (["attention", '--mechanisms=["dense", "spars window=3"]'], "unknown attention 'spars'; did you mean sparse"),
    (["step", '--mechanisms=["sparse locl"]'], "unknown mechanism 'sparse locl'; did you mean sparse local"),
    (["step", '--mechanisms=["sparse windo=3"]'], "unknown option of sparse 'windo'; did you mean window"),
    (["step", '--mechanisms=["sparse window=three"]'],
     "mechanisms, sparse: window expects int (like 128), got str 'three'"),
    (["attention", '--mechanisms=["sparse sparse_pattern=round"]', '--shapes=["1x1x16"]'],
     "unknown sparse_pattern 'round'"),
    (["attention", '--mechanisms=["dense", "dense"]', '--shapes=["1x1x16"]'], "expected each once"),
    (["attention", "--mechanisms=[7]", '--shapes=["1x1x16"]'], "unknown attention '7'"),
    (["attention", "--attention=sparse", '--mechanisms=["dense"]', '--shapes=["1x1x16"]'], "not both"),
    (["step", "--window=8"], "window"),
    (["ranks"], "many ranks are to be measured: torchrun --standalone"),
    (["step", "--peer=nowhere"], "folder of a nanoGPT clone"),
    (["step", "--repeat=0"], "repeat must be at least 1"),
    (["attention", "--n_kv_head=2", '--shapes=["1x4x16"]'], "n_kv_head expects the mode step, sample or ranks"),
    (["layer", '--mechanisms=["dense n_kv_head=1"]'], "n_kv_head expects the mode step"),
    (["step", "--kernel=flash"], "unknown kernel 'flash'"),
    (["step", '--mechanisms=["dense kernel=flash"]'], "unknown kernel 'flash'"),
    (["attention", "--kernel=sdpa", '--mechanisms=["sparse window=3"]', '--shapes=["1x1x16"]'],
     "kernel=sdpa computes dense"),
])
def test_refused(refused, quick, arguments, says):
    assert says in refused(bench, *arguments)


def test_side_by_side():
    """Calls alternate, each timed right after itself; two rounds are not counted, and the middle time is taken."""
    order = []
    costs = timing.side_by_side([lambda: order.append("a"), lambda: order.append("b")], times=4)
    assert order == ["a", "b"] * 2 + ["a", "a", "b", "b"] * 4
    assert [cost.rounds for cost in costs] == [4, 4] and all(cost.seconds > 0 for cost in costs)
    slow = [0, 0, 0, 0, 0, 0.2, 0.2, 0]
    assert timing.side_by_side([lambda: time.sleep(slow.pop(0))], times=3)[0].seconds < 0.1 and not slow


def test_long_calls_are_not_repeated(monkeypatch):
    calls, clock = [], iter(range(0, 10**6, 2))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    timing.side_by_side([lambda: calls.append(0)], times=3)
    assert len(calls) == 2 + 3


@pytest.mark.parametrize("times, budget, rounds", [(9, 0.0, 1 + 2 * 3), (2, 0.0, 1 + 2 * 2), (9, 60.0, 2 + 2 * 9)])
def test_long_rounds_are_measured_less_often(times, budget, rounds):
    calls = []
    (cost,) = timing.side_by_side([lambda: calls.append(0)], times=times, budget=budget)
    assert len(calls) == rounds and cost.rounds == (min(times, 3) if budget == 0 else times)


def test_memory_is_of_a_call_alone():
    """What an earlier call took, and what is kept, is not the call's."""
    kept = []
    big, small, keeps = timing.side_by_side([
        lambda: torch.ones(2**25).sum(), lambda: torch.ones(2**23).sum(), lambda: kept
        or kept.append(torch.ones(2**24))])
    if not math.isnan(big.memory):
        assert 120 < big.memory / 2**20 < 140 and 30 < small.memory / 2**20 < 45 and keeps.memory / 2**20 < 8


def test_peak_memory_counts_from_its_reset():
    hardware.reset_peak_memory()
    before = hardware.peak_memory()
    block = torch.ones(2**24)  # 64 MiB
    if not math.isnan(before):
        assert hardware.peak_memory() - before > 60 * 2**20
    del block


def test_devices_and_precisions():
    assert hardware.pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        hardware.pick_device("gpu")
    with pytest.raises(UserError, match="unknown dtype 'half'"):
        hardware.pick_dtype("half", "cpu")
    assert hardware.pick_dtype("float32", "cpu") == "float32"


@pytest.mark.parametrize("rates, expected", [((100, 400), "bfloat16"), ((100, 50), "float32"), ((100, 110), "float32")])
def test_bfloat16_only_where_it_is_faster(monkeypatch, rates, expected):
    """A CPU that emulates it is slower with it, and says nothing."""
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, dtype: rates[dtype == "bfloat16"])
    assert hardware.pick_dtype("auto", "cpu") == expected
