"""The benchmark runs, measures what it says, and refuses what it cannot measure."""

import json
import math

import pytest
import torch
from conftest import call

import bench
import hardware
from configurator import UserError

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


SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--repeat=2", "--dtype=float32"]


def rows(out):
    """The cells of the Markdown table in what was printed, without its ruling."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for n, line in enumerate(lines) if n != 1]


def test_attention(capsys, tmp_path):
    file = tmp_path / "rows.json"
    assert call(bench, "attention", '--shapes=["1x2x64", "2x1x100"]', "--head_size=8", f"--results={file}", *SMALL[3:]) in (None, 0)
    head, first, second = rows(capsys.readouterr().out)
    assert first[:2] == ["dense", "1x2x64"] and len(head) == len(first) == len(second)
    saved = json.loads(file.read_text("utf-8"))
    row = saved["rows"][0]
    assert row["pairs kept"] == 64 * 65 / 2 / 64**2 and row["pairs multiplied"] == 1.0
    assert row["times as fast"] == pytest.approx(row["fused call, ms"] / row["ms"])
    assert row["GFLOP/s"] == pytest.approx(12 * 8 * 2080 * 2 / row["ms"] / 1e6)
    assert saved["machine"]["torch"] and saved["matmul_gflops"] > 0


def test_step(capsys, peer):
    assert call(bench, "step", "--batch_size=2", "--block_size=32", "--vocab_size=11", f"--peer={peer}", *SMALL) in (None, 0)
    out = capsys.readouterr().out
    head, here, other = rows(out)
    assert here[0] == "here, float32" and other[0] == "nanoGPT, float32" and "what a peer says" not in out
    assert float(other[head.index("times nanoGPT as it is")]) == 1.0


def test_sample(capsys, peer):
    assert call(bench, "sample", "--contexts=[16]", "--tokens=16", "--vocab_size=11", f"--peer={peer}", *SMALL) in (None, 0)
    head, here, other = rows(capsys.readouterr().out)
    assert here[:2] == ["here, float32", "16"] and other[0] == "nanoGPT" and len(head) == len(here)


@pytest.mark.parametrize("arguments, says", [
    ([], "unknown benchmark ''; there are attention, sample, step"),
    (["steps"], "unknown benchmark 'steps'; did you mean step"),
    (["attention", '--shapes=["1x2"]'], "expected BATCHxHEADSxTIME"),
    (["attention", "--attention=spars"], "unknown attention 'spars'"),
    (["step", "--peer=nowhere"], "folder of a nanoGPT clone"),
    (["step", "--repeat=0"], "repeat must be at least 1"),
    (["step", "--kernel=flash"], "unknown kernel 'flash'"),
])
def test_refused(refused, arguments, says):
    assert says in refused(bench, *arguments)


def test_side_by_side():
    """Calls alternate, one round is not counted, and the middle time is taken."""
    order = []
    times = hardware.side_by_side([lambda: order.append("a"), lambda: order.append("b")], times=3)
    assert order == ["a", "b"] * 4 and len(times) == 2 and all(t > 0 for t in times)


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
