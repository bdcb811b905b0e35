"""Small models learn small data."""


import pytest
import torch
from training_runs import fit, log_of

import sample
from core.dataset import Dataset
from helpers import call

pytestmark = pytest.mark.usefixtures("quick")


def test_it_learns_the_toy_sentences(toy, tmp_path, capsys):
    assert not fit(tmp_path, toy, "--pos=sinusoidal", "--block_size=8", "--batch_size=16", "--learning_rate=1e-2",
                   "--max_iters=150", "--eval_interval=50", "--log_interval=50")
    for start, follows in (("i love deep", "learning"), ("artificial intelligence", "is"),
                           ("models learn", "patterns")):
        capsys.readouterr()
        call(sample, f"--out_dir={tmp_path}", f"--start={start}", "--temperature=0", "--max_new_tokens=1",
             "--num_samples=1", "--device=cpu", "--dtype=float32")
        assert capsys.readouterr().out.split("\n")[0] == f"{start} {follows}"


def test_it_learns_source_text(text, tmp_path):
    """Below 2.8 nats a byte: less than the frequencies of bytes in the judged text itself would give."""
    assert not fit(tmp_path, text, "--n_embd=32", "--block_size=32", "--batch_size=16", "--learning_rate=1e-2",
                   "--max_iters=200", "--eval_interval=100", "--log_interval=50")
    counts = torch.bincount(torch.tensor(Dataset(text).tokens("val"), dtype=torch.long))
    p = counts[counts > 0] / counts.sum()
    assert log_of(tmp_path)[-1]["loss"] < 2.8 < -(p * p.log()).sum()


def test_it_learns_labels(reviews, tmp_path):
    assert not fit(tmp_path, reviews, "--block_size=64", "--learning_rate=1e-2", "--max_iters=60", "--eval_interval=20",
                   "--eval_iters=0")
    assert log_of(tmp_path)[-1]["accuracy"] == 1.0
