"""Tables of n-grams with sparse gradients (ngram_sparse): the step against its formula, runs that resume, and ranks."""

import pytest
import torch
from training_runs import assert_same_runs, fit, log_of

import train
from core import dist, hardware
from core.optimizers import adamw
from model import GPT, GPTConfig, load

SPARSE = ("--ngram=3", "--ngram_rows=40", "--ngram_dim=4", "--ngram_sparse=True", "--ngram_lr=20")


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_size=16, ngram=3, ngram_rows=50,
                         ngram_dim=4, **changes))


def batch(n):
    return torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(n))


def backward(model, n):
    model(batch(n), batch(n + 1))[1].backward()


def test_gradients_are_those_of_dense_tables():
    sparse, dense = tiny(ngram_sparse=True), tiny()
    for model in (sparse, dense):
        backward(model, 0)
        backward(model, 5)  # accumulated
    norms = [dist.clip_grad_norm(model, 0.01) for model in (sparse, dense)]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5) and norms[1] > 0.01
    for (name, p), (_, q) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
        assert p.grad.is_sparse == name.startswith("ngrams.tables")
        assert torch.allclose(p.grad.to_dense(), q.grad, atol=1e-7), name


def test_a_step_is_adam_of_the_rows_that_it_reads():
    """Against the formula (Kingma and Ba 2015, algorithm 1) with beta1 = 0, and an average of squares that stands still
    in rows that are not read."""
    model = tiny(ngram_sparse=True)
    optimizer = adamw(model.parameter_groups(0.1, ngram_lr=3.0), 1e-2, (0.8, 0.9))
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    table = model.ngrams.tables[0].weight
    expected = table.detach().double().clone()
    square = torch.zeros_like(expected)
    for step in range(1, 5):
        backward(model, step)
        gradient = table.grad.to_dense().double()
        read = torch.zeros(50, dtype=bool)
        read[table.grad.coalesce().indices()[0]] = True
        square[read] = 0.9 * square[read] + 0.1 * gradient[read] ** 2
        change = 3e-2 * (1 - 0.9**step) ** 0.5 * gradient / (square.sqrt() + 1e-8)
        expected[read] -= change[read]
        optimizer.step()
        optimizer.zero_grad()
        assert 0 < read.sum() < 50
        assert torch.allclose(table.double(), expected, atol=1e-6)


def test_rates_of_the_groups():
    groups = tiny(ngram_sparse=True).parameter_groups(0.1, ngram_lr=20.0)
    sparse = [(group["lr_scale"], len(group["params"])) for group in groups if group["sparse"]]
    assert sparse == [(20.0, 2)] and {group["lr_scale"] for group in groups if not group["sparse"]} == {1.0}
    assert not any(group["sparse"] for group in tiny().parameter_groups(0.1))


def test_a_rate_of_0_changes_nothing():
    """As in the steps that compare.py measures."""
    model = tiny(ngram_sparse=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer = adamw(model.parameter_groups(0.0), 0.0, (0.9, 0.99))
    backward(model, 0)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_another_optimiser_says_what_it_cannot_do():
    model = tiny(ngram_sparse=True)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


def test_resumed_equals_unbroken(text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    line = (*SPARSE, "--max_iters=6", "--lr_decay_iters=6", "--eval_interval=3", "--gradient_accumulation_steps=2")
    assert not fit(whole, text, *line)
    assert not fit(cut, text, *line, "--max_iters=3")
    assert not fit(cut, text, *line, "--init_from=resume")
    assert_same_runs(whole, cut)
    first = load(cut / "best.pt")[0].state_dict()["ngrams.tables.0.weight"]
    assert first.isfinite().all()


def test_sparse_tables_learn_as_dense_ones(text, tmp_path):
    losses = []
    for name, line in (("sparse", SPARSE), ("dense", [*SPARSE[:3], "--ngram_sparse=False"])):
        assert not fit(tmp_path / name, text, *line, "--max_iters=40", "--learning_rate=1e-2")
        losses.append([record["loss"] for record in log_of(tmp_path / name, "train")])
    for losses_of_one in losses:
        assert losses_of_one[-1] < losses_of_one[0] - 0.5


def test_sharded_and_several_gpus_are_refused(text, tmp_path, refused, monkeypatch):
    line = (f"--dataset={text}", f"--out_dir={tmp_path / 'out'}", *SPARSE)
    assert "it cannot be sharded" in refused(train, *line, "--device=cpu", "--shard=True")
    monkeypatch.setattr(dist, "world", 2)
    monkeypatch.setattr(hardware, "pick_device", lambda asked: "cuda:0")
    assert "adds no sparse gradients of several GPUs" in refused(train, *line)
