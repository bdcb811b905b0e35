"""Other optimisers, swapped in by editing `configure_optimizer` in a copy of train.py: they resume, and ranks share
them."""

import pytest
import torch
from edited import edited_copy, train
from training_runs import assert_same_runs, log_of

from core.config import UserError
from core.optimizers import initialize_state, optimizer_state, restore_optimizer, state_of
from model import GPT, GPTConfig, load

ADAMW = "    return adamw(groups, learning_rate, (beta1, beta2))\n"
OPTIMIZERS = {
    "sgd": "    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)\n",
    "muon": """\
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("layers.")]
    others = [p for name, p in named if not (p.ndim == 2 and name.startswith("layers."))]
    others = torch.optim.AdamW(others, lr=learning_rate, fused=True)
    return Optimizers(torch.optim.Muon(matrices, lr=learning_rate), others)
""",
}


@pytest.fixture(params=OPTIMIZERS)
def scripts(request, tmp_path):
    return edited_copy(tmp_path, (ADAMW, OPTIMIZERS[request.param]))


def assert_close(one, other):
    """Two runs that differ by float32 rounding, which Muon's bfloat16 iteration enlarges."""
    for a, b in zip(log_of(one, "train"), log_of(other, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
    a, b = (load(folder / "ckpt.pt")[0].state_dict() for folder in (one, other))
    assert all((a[name] - b[name]).abs().max() < 5e-3 for name in a)


def test_resume_ranks_and_shards(scripts, text, tmp_path):
    whole, cut, ranks, shards = (tmp_path / name for name in ("whole", "cut", "ranks", "shards"))
    train(scripts, whole, text)
    train(scripts, cut, text, "--max_iters=3")
    train(scripts, cut, text, "--init_from=resume")
    assert_same_runs(whole, cut)
    state = torch.load(whole / "ckpt.pt", weights_only=True)["optimizer"]
    assert all("momentum_buffer" in state[f"layers.{n}.up.weight"] for n in (0, 1))
    train(scripts, ranks, text, ranks=2)
    assert_close(whole, ranks)
    train(scripts, shards, text, "--shard=True", "--max_iters=3", ranks=2)
    said = train(scripts, shards, text, "--shard=True", "--init_from=resume", ranks=2)
    assert "resume: from step 3 of 6" in said
    assert_close(whole, shards)


# ---- the state itself --------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_size=16))


def steps(model, optimizer, count):
    for n in range(count):
        idx = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(n))
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name",
                         ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop",
                          "Adadelta", "Adafactor"])
def test_state_of_every_optimiser(name):
    """Saved, and restored into a new optimiser, it continues to the bit; and no weight changes by restoring."""
    def make(model):
        return getattr(torch.optim, name)(model.parameters(), lr=1e-2, **({"momentum": 0.9} if name == "SGD" else {}))

    model = tiny()
    optimizer = make(model)
    steps(model, optimizer, 3)
    saved = {"optimizer": {key: {k: v.clone() if torch.is_tensor(v) else v for k, v in value.items()}
                           for key, value in optimizer_state(model, optimizer).items()}, "state": {"step": 3}}
    other = tiny()
    other.load_state_dict(model.state_dict())
    again = make(other)
    restore_optimizer(None, saved, other, again)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert all(group["lr"] == 1e-2 for group in again.param_groups)
    for each in ((model, optimizer), (other, again)):
        steps(*each, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_state_of_another_optimiser_is_refused():
    model = tiny()
    adamw, sgd = torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters(), momentum=0.9)
    steps(model, adamw, 1)
    steps(model, sgd, 1)
    new_sgd, new_adamw = torch.optim.SGD(model.parameters(), momentum=0.9), torch.optim.AdamW(model.parameters())
    for saved, into in ((adamw, new_sgd), (sgd, new_adamw)):
        checkpoint = {"optimizer": optimizer_state(model, saved), "state": {"step": 1}}
        with pytest.raises(ValueError, match="what configure_optimizer returns expects"):
            restore_optimizer(None, checkpoint, model, into)
    empty = {"optimizer": {name: {} for name, _ in model.named_parameters()}, "state": {"step": 1}}
    with pytest.raises(ValueError, match="it is empty"):
        restore_optimizer(None, empty, model, torch.optim.AdamW(model.parameters()))


def test_state_that_no_checkpoint_holds_is_refused():
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    initialize_state(optimizer)
    next(iter(state_of(optimizer).values()))["history"] = [1, 2]
    with pytest.raises(UserError, match="history of type list; a checkpoint holds tensors and numbers"):
        optimizer_state(model, optimizer)
