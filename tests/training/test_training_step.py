"""What a training step does to the weights, against the same steps written out by hand."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_runs import SMALL, fit, log_of

import train
from core import dist
from core.dataset import Dataset, batches
from helpers import call
from model import GPT, GPTConfig, load

SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True, "norm": "layernorm"}
LEARNING_RATE, MIN_LR, WARMUP, STEPS, DECAY, BETA1, BETA2, CLIP, SEED = 1e-2, 1e-3, 2, 5, 0.1, 0.8, 0.95, 0.7, 3
LINE = (*(f"--{key}={value}" for key, value in SHAPE.items()), "--batch_size=4", "--gradient_accumulation_steps=2",
        f"--learning_rate={LEARNING_RATE}", f"--min_lr={MIN_LR}", f"--warmup_iters={WARMUP}", f"--max_iters={STEPS}",
        f"--weight_decay={DECAY}", f"--beta1={BETA1}", f"--beta2={BETA2}", f"--grad_clip={CLIP}", f"--seed={SEED}",
        "--eval_interval=2", "--eval_iters=1", "--log_interval=1", "--device=cpu", "--dtype=float32")
pytestmark = pytest.mark.usefixtures("quick")


def learning_rate(step):
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / (WARMUP + 1)
    return MIN_LR + (LEARNING_RATE - MIN_LR) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def steps_by_hand(model, source):
    """Train `model` in place: AdamW (Loshchilov and Hutter 2019, algorithm 2) with clipped gradients.
    Returns (loss, norm of the gradient before clipping) of each step."""
    parameters, records = list(model.parameters()), []
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(STEPS):
        losses = [model(*source.batch(2 * step + micro))[1] for micro in range(2)]  # of texts that no other step sees
        loss = (losses[0] + losses[1]) / 2
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        records.append((loss.item(), norm))
        lr, scale = learning_rate(step), min(1.0, CLIP / norm)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second):
                m.mul_(BETA1).add_(g * scale, alpha=1 - BETA1)
                v.mul_(BETA2).add_((g * scale).square(), alpha=1 - BETA2)
                if p.dim() > 1:  # biases and the norms' gains do not decay
                    p.mul_(1 - lr * DECAY)
                corrected = m / (1 - BETA1 ** (step + 1)), v / (1 - BETA2 ** (step + 1))
                p.sub_(lr * corrected[0] / (corrected[1].sqrt() + 1e-8))
    return records


def test_steps_by_hand(text, tmp_path):
    """Weights from the seed, batches, accumulation, clipping, AdamW, its groups and the schedule, all at once."""
    assert not call(train, f"--out_dir={tmp_path}", f"--dataset={text}", *LINE)
    torch.manual_seed(SEED)
    model = GPT(GPTConfig(**SHAPE, vocab_size=256)).train()
    before = [p.detach().clone() for p in model.parameters()]
    expected = steps_by_hand(model, batches(Dataset(text), "train", 4, 16, SEED))
    records = log_of(tmp_path, "train")
    assert [(r["loss"], r["grad_norm"]) for r in records] == [pytest.approx(pair, rel=1e-4) for pair in expected]
    assert [r["lr"] for r in records] == pytest.approx([learning_rate(step) for step in range(STEPS)])
    assert any(norm > 1.5 * CLIP for _, norm in expected)  # else clipping would not have been tried
    trained, _ = load(tmp_path / "ckpt.pt")
    for p, q, start in zip(model.parameters(), trained.parameters(), before):
        assert (p - q).abs().max() < 1e-5 and (p - start).abs().max() > 1e-3


def test_the_rate_of_the_mask(text, tmp_path):
    """AdamW's first step is the learning rate in size: spans move ten times as far, and nothing else does."""
    moves = []
    for mask_lr in (1.0, 10.0):
        out = tmp_path / str(mask_lr)
        assert not fit(out, text, "--max_iters=1", f"--mask_lr={mask_lr}", "--use_adaptive_attention=True",
                       "--learning_rate=1e-3", "--warmup_iters=0", "--weight_decay=0")
        torch.manual_seed(1337)
        model = load(out / "ckpt.pt")[0]
        start = GPT(model.config)
        moves.append({name: p - q for (name, p), q in zip(model.named_parameters(), start.parameters())})
    for name, move in moves[0].items():
        scale = 10 if name.endswith("attention.span") else 1
        assert move.abs().max() > 5e-4, name
        torch.testing.assert_close(moves[1][name], scale * move, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_optimiser_gets_clipped_gradients(text, tmp_path, clip):
    """Of the norm `grad_clip` over all weights together, in the direction they had; 0: as they are."""
    seen = []

    def look(optimizer, *_):
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(look)
    try:
        for name, most in (("plain", 0), ("clipped", clip)):
            line = (f"--out_dir={tmp_path / name}", f"--dataset={text}", *LINE, "--max_iters=1", f"--grad_clip={most}")
            assert not call(train, *line)
    finally:
        hook.remove()
    plain, clipped = (torch.cat([g.flatten() for g in gradients]) for gradients in seen)
    norms = [log_of(tmp_path / name, "train")[0]["grad_norm"] for name in ("plain", "clipped")]
    assert norms == pytest.approx([plain.norm().item()] * 2, rel=1e-5) and plain.norm() > 0.5
    torch.testing.assert_close(clipped, plain * (clip / plain.norm() if clip else 1), rtol=1e-4, atol=1e-9)


def test_each_rank_has_a_random_stream_of_its_own(monkeypatch):
    """Dropout that is the same on all ranks would be that of one of them on fewer texts."""
    draws = {}
    with torch.random.fork_rng():
        for rank in range(3):
            monkeypatch.setattr(dist, "rank", rank)
            for number, step in ((1, 0), (1, 7), (2, 0)):
                dist.seed(number, step)
                draws[rank, number, step] = tuple(torch.randint(2**31, (8,)).tolist())
        dist.seed(2, 0)
        assert draws[2, 2, 0] == tuple(torch.randint(2**31, (8,)).tolist())
    assert len(set(draws.values())) == len(draws) == 9
    assert len(np.unique(list(draws.values()))) == 72


def test_learning_rate(monkeypatch):
    for key, value in {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 4, "max_iters": 24,
                       "lr_decay_iters": 0}.items():
        monkeypatch.setattr(train, key, value)
    assert [train.get_lr(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert train.get_lr(9) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert train.get_lr(14) == pytest.approx(0.55) and train.get_lr(24) == train.get_lr(99) == pytest.approx(0.1)
    monkeypatch.setattr(train, "lr_schedule", "linear")
    assert [train.get_lr(step) for step in (4, 9, 14, 24, 99)] == pytest.approx([1.0, 0.775, 0.55, 0.1, 0.1])
    monkeypatch.setattr(train, "lr_decay_iters", 14)
    assert [train.get_lr(step) for step in (9, 14, 20)] == pytest.approx([0.55, 0.1, 0.1])
    monkeypatch.setattr(train, "decay_lr", False)
    assert [train.get_lr(step) for step in (0, 4, 99)] == pytest.approx([0.2, 1.0, 1.0])
    monkeypatch.setattr(train, "warmup_iters", 0)
    assert train.get_lr(0) == 1.0


def test_gradients_are_not_cast(text, tmp_path, monkeypatch):
    """Autocast is for the forward pass alone: in the backward pass it would round the engine's float32 sums."""
    make, seen = train.new_model, []

    def watched(config):
        model = make(config)
        model.embedding.weight.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
        return model

    monkeypatch.setattr(train, "new_model", watched)
    assert not fit(tmp_path, text, "--max_iters=2", "--dtype=bfloat16")
    assert seen == [False, False]


def test_accumulated_gradients(text, tmp_path, monkeypatch):
    """Two halves of a batch give the step of the whole, within float32 rounding. (Two runs with 2 x 8 and 1 x 16 texts
    see different texts: batches are numbered through, and each draws its own. So the halves are cut here.)"""

    class Halves:
        def __init__(self, source):
            self.source = source

        def batch(self, number, *part):
            x, y, _ = self.source.batch(number // 2)
            half = slice(8 * (number % 2), 8 * (number % 2) + 8)
            return x[half], y[half], None

        def share(self, *part):
            return 1.0

    assert not fit(tmp_path / "whole", text, "--max_iters=5", "--batch_size=16")
    monkeypatch.setattr(train, "batches", lambda data, split, size, *more: batches(data, split, size, *more)
                        if split != "train" else Halves(batches(data, split, 16, *more)))
    assert not fit(tmp_path / "halves", text, "--max_iters=5", "--batch_size=8", "--gradient_accumulation_steps=2")
    whole, halves = log_of(tmp_path / "whole", "train"), log_of(tmp_path / "halves", "train")
    for one, other in zip(whole, halves):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["dropout", "ngram_dropout"])
def test_dropout_is_on_in_training_and_off_in_evaluation(text, tmp_path, name):
    for n, line in enumerate((f"--{name}=0.0", f"--{name}=0.5")):
        assert not fit(tmp_path / str(n), text, "--max_iters=1", "--ngram=2", "--ngram_rows=9", line)
    (val, plain, *_), (same, dropped, *_) = log_of(tmp_path / "0"), log_of(tmp_path / "1")
    assert val == same and plain["loss"] != dropped["loss"]


def test_seeds(text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert not fit(tmp_path / name, text, "--max_iters=3", f"--seed={seed}")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") != log_of(tmp_path / "c")


def test_compiled(toy, tmp_path, asked):
    """What torch.compile wraps leaves no trace in the checkpoint, and changes losses by rounding only."""
    small = ("--max_iters=3", "--n_layer=1", "--block_size=8")
    assert not fit(tmp_path / "compiled", toy, *small, "--compile=True")
    assert len(asked) == 1 and not fit(tmp_path / "plain", toy, *small)
    one, other = (torch.load(tmp_path / name / "ckpt.pt")["model"].keys() for name in ("compiled", "plain"))
    assert one == other
    for one, other in zip(log_of(tmp_path / "compiled"), log_of(tmp_path / "plain")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_compile_without_a_compiler(text, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    line = refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL, "--compile=True")
    assert "compile=True needs a C++ compiler on a CPU and found none" in line
