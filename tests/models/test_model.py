"""The model: cached decoding equals the full pass, padding and batches change nothing, counts are true."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from core import contract
from core.checkpoint import save
from core.config import UserError
from core.hardware import activation_bytes
from core.inference import PackedLinear, convert_for_inference, sample_next_token
from core.mechanisms import mechanism
from core.ops import rms_norm
from model import GPT, GPTConfig, load

SMALL = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)


def make(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes})).double().eval()
    for p in model.parameters():  # far from the start, where all outputs look alike
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("kernel", ["engine", "sdpa", "reference"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("pos", ["rope", "learned", "sinusoidal", "none"])
def test_cached_equals_full(pos, norm, kernel):
    check_cached(make(pos=pos, norm=norm, kernel=kernel, bias=True))


@pytest.mark.parametrize("document_mask", [False, True])
def test_cached_ngrams(document_mask):
    check_cached(make(ngram=4, ngram_rows=97, ngram_dim=3, document_mask=document_mask, document_mark=7))


def check_cached(model):
    """Token by token, and in pieces, through the caches: the logits of the full pass."""
    idx = torch.randint(50, (3, 16))
    with torch.no_grad():
        full = model(idx, targets=idx)[0]
        for pieces in ([1] * 16, [5, 1, 7, 3], [16]):
            caches, at = model.new_caches(), 0
            for n in pieces:
                at += n
                logits = model(idx[:, at - n : at], caches=caches)[0]
                assert (logits[:, 0] - full[:, at - 1]).abs().max() < 1e-12


@pytest.mark.parametrize("changes", [{}, {"pos": "none"}, {"pos": "none", "attention": "alibi"}], ids=str)
def test_past_the_block_size_rotary_positions_slide(changes):
    """Every token past the block size is the one the full pass over the whole text gives; without positions, too."""
    model = make(**changes)
    prompt = torch.randint(50, (2, 5))
    text = model.generate(prompt, 60, temperature=0)
    with torch.no_grad():
        full = model(text, targets=text)[0]
    torch.testing.assert_close(text[:, 5:], full.argmax(-1)[:, 4:-1])
    assert model.new_caches()[0].size == 16
    # a prompt longer than a block is the same text
    torch.testing.assert_close(model.generate(text[:, :40], 25, temperature=0), text)


@pytest.mark.parametrize("pos", ["learned", "sinusoidal"])
def test_past_the_block_size_absolute_positions_start_again(pos):
    """At the end of the block the text goes on from its latest half block, at position 0."""
    model = make(pos=pos)
    text = model.generate(torch.randint(50, (2, 5)), 40, temperature=0)
    first = 0  # what the model has in view begins here
    with torch.no_grad():
        for at in range(5, 45):
            if at - first > 16:
                first = at - 8
            expected = model(text[:, first:at])[0][:, -1].argmax(-1)
            torch.testing.assert_close(text[:, at], expected, msg=f"token {at}")
    with pytest.raises(UserError, match="16 positions .* got a text of 17"):
        model(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("pool", ["mean", "max", "first"])
@pytest.mark.parametrize("pos, ngram", [("rope", 0), ("learned", 3), ("none", 0)])
def test_padding_and_batch_change_nothing(pos, ngram, pool):
    model = make(n_class=2, pool=pool, pos=pos, ngram=ngram)
    x, lengths = torch.randint(50, (3, 16)), torch.tensor([16, 9, 1])
    logits = model(x, lengths=lengths)[0]
    assert logits.shape == (3, 2)
    for n, length in enumerate(lengths):
        alone = model(x[n : n + 1, :length])[0]
        assert (alone[0] - logits[n]).abs().max() < 1e-12
    garbage = torch.where(torch.arange(16) < lengths[:, None], x, 49)
    assert (model(garbage, lengths=lengths)[0] - logits).abs().max() < 1e-12


def test_dropout_is_everywhere_while_training_and_nowhere_else(monkeypatch):
    """After the embedding, and after attention and MLP of each layer; attention's own is in its tests."""
    import attention

    rates = []
    for module in (attention, model_file):
        monkeypatch.setattr(module, "drop", lambda x, p: rates.append(p) or x)
    model, idx = make(dropout=0.3), torch.randint(50, (1, 16))
    model.train()(idx)
    model.eval()(idx)
    assert rates == [0.3] * 5 + [0.0] * 5


def test_ngrams_are_dropped_as_a_whole_in_training():
    model, idx = make(ngram=4, ngram_rows=97, ngram_dim=5, ngram_dropout=0.25), torch.randint(50, (40, 50))
    seen = []
    model.ngrams.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].unflatten(2, (3, 5))))
    for mode in (False, True):
        model.train(mode).ngrams(idx)
    plain, dropped = seen
    kept = (dropped != 0).any(3, keepdim=True)
    torch.testing.assert_close(dropped, torch.where(kept, plain / 0.75, 0), rtol=1e-12, atol=0)
    assert (kept.float().mean((0, 1)) - 0.75).abs().max() < 0.05  # of 2,000 tokens: five standard deviations
    assert not kept.flatten(2).all(2).equal(kept.flatten(2).any(2))  # tables drop independently


@pytest.mark.parametrize("changes", [{}, {"ngram": 4, "ngram_rows": 97}])
def test_a_later_token_changes_no_earlier_output(changes):
    model = make(**changes)
    idx = torch.randint(50, (1, 16))
    changed = idx.clone()
    changed[0, 9] = (idx[0, 9] + 1) % 50
    a, b = (model(x, targets=x)[0] for x in (idx, changed))
    assert (a[:, :9] - b[:, :9]).abs().max() < 1e-12 < (a[:, 9:] - b[:, 9:]).abs().max()


def test_loss():
    """The mean over the targets that count, in nats; without training, near log V."""
    model = GPT(GPTConfig(**SMALL))
    idx, targets = torch.randint(50, (2, 4, 16))
    targets[:, 8:] = -1
    logits, loss = model(idx, targets)
    expected = -torch.log_softmax(logits[:, :8], -1).gather(2, targets[:, :8, None]).mean()
    torch.testing.assert_close(loss, expected)
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)


def test_rms_norm():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
    assert torch.autograd.gradcheck(rms_norm, x)


@pytest.mark.parametrize("changes",
                         [{}, {"n_class": 2}, {"tie": False, "bias": True, "norm": "layernorm", "pos": "learned"},
                          {"n_head": 4, "n_kv_head": 1, "qk_norm": True},
                           {"ngram": 3, "ngram_rows": 11, "ngram_dim": 5}])
def test_counts(changes):
    """Parameters and work as counted are what is there. PyTorch counts the reference's full matrix."""
    model = GPT(GPTConfig(**{**SMALL, "kernel": "reference", **changes}))
    C, V = 16, 50
    per_layer = 12 * C * C + (13 * C - 4 * C + 4 * C if changes.get("bias") else 0)  # biases 3C + C + 4C + C, norms 4C
    if changes.get("n_kv_head"):
        per_layer += 2 * 4 * C - 2 * C * C + 2 * 4  # keys and values of one head of 4 channels; two gains
    expected = V * C + 2 * per_layer
    if changes.get("ngram"):
        expected += 2 * 5 * (11 + C)
    if changes.get("n_class"):
        expected += 2 * C + 2
    if changes.get("bias"):
        expected += 2 * C + V * C + 16 * C
    assert model.parameter_count() == expected
    idx = torch.randint(50, (1, 16))
    target = torch.tensor([1]) if changes.get("n_class") else idx
    with FlopCounterMode(display=False) as counter:
        model(idx, target)[1].backward()
    found = model.estimate_flops(16) * 16  # the plan of 16 tokens is one block: all pairs, like the reference's
    if changes.get("n_class"):
        found += 3 * 2 * C * 2  # the head, once a text
    assert counter.get_total_flops() == found


def test_activation_bytes():
    """What the forward pass keeps grows with the batch, and asks for no randomness of the run."""
    model = GPT(GPTConfig(**{**SMALL, "dropout": 0.5}))
    idx = torch.randint(50, (4, 16))
    state = torch.get_rng_state()
    one, four = activation_bytes(model, idx[:1], idx[:1]), activation_bytes(model, idx, idx)
    assert torch.equal(state, torch.get_rng_state())
    assert one > 2 * 16 * 16 * 4 * 10 and 3 < four / one < 4.5


@pytest.mark.parametrize("supported", [PackedLinear.is_supported(), False])
def test_convert_for_inference(monkeypatch, supported):
    """bfloat16, with weights packed if the processor supports it, draws from the same distribution within that
    precision."""
    monkeypatch.setattr(PackedLinear, "is_supported", lambda: supported)
    model = GPT(GPTConfig(**{**SMALL, "n_embd": 64})).eval()
    idx = torch.randint(50, (1, 12))
    with torch.no_grad():
        before = model(idx)[0]
        after = convert_for_inference(model, torch.bfloat16)(idx)[0]
    kinds = {type(module) for module in model.modules()}
    assert (PackedLinear in kinds, nn.Linear in kinds) == (supported, not supported)
    assert after.dtype == torch.bfloat16
    assert (before - after).norm() < 0.02 * before.norm()


def test_draw():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    random = torch.Generator().manual_seed(0)

    def shares(**how):
        drawn = torch.stack([sample_next_token(logits, generator=random, **how) for _ in range(3000)])
        return torch.bincount(drawn.flatten(), minlength=4) / 3000

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_p=0.4), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(shares(temperature=0), torch.tensor([1.0, 0, 0, 0]))
    cold = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(shares(temperature=0.5), cold / cold.sum(), atol=0.03, rtol=0)


def test_generation_repeats_with_its_seed():
    model, prompt = make(), torch.randint(50, (2, 3))
    texts = [model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("wrong, says", [
    ({"pos": "ropes"}, "unknown pos 'ropes'; did you mean rope"),
    ({"norm": "batch"}, "unknown norm 'batch'"),
    ({"kernel": "flash"}, "unknown kernel 'flash'"),
    ({"attention": "dens"}, "unknown attention 'dens'; did you mean dense"),
    ({"n_embd": 15}, "n_embd must be a multiple of 4"),
    ({"dropout": 1.0}, "dropout must be"), ({"ngram_dropout": 1.0}, "ngram_dropout must be"),
    ({"activation": "relu"}, "unknown activation 'relu'; did you mean relu2"),
    ({"ngram": 1}, "ngram must be 0 or from 2 to 16, got 1"),
    ({"ngram": 2, "ngram_rows": 0}, "ngram_rows must be from 1 to 2..26"),
    ({"n_layer": 0}, "n_layer must be at least 1"),
    ({"options": {"window": 3}}, "dense has no option window"),
])
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        GPT(GPTConfig(**{**SMALL, **wrong}))


@pytest.mark.parametrize("name, lines, kept_by_8", [
    ("my_window", 6, [6, 7, 8]), ("my_alibi", 5, list(range(9))), ("my_sinks", 4, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
])
def test_the_examples_of_the_readme(monkeypatch, tmp_path, name, lines, kept_by_8):
    """Each is under ten lines and nothing but a formula, works by its name, with its options, keeps to the laws, and
    travels in a checkpoint."""
    root = Path(model_file.__file__).parent
    source = (root / "README.md").read_text("utf-8").split(f'"""{name}.py')[1].split("```")[0]
    assert len([line for line in source.splitlines()[1:] if line.strip()]) == lines < 10
    for file in ("model.py", "attention.py"):
        (tmp_path / file).write_text((root / file).read_text("utf-8"), "utf-8")
    (tmp_path / f"{name}.py").write_text('"""' + source, "utf-8")
    monkeypatch.setattr("core.config.ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"window": 3} if name == "my_window" else {}
    assert mechanism(name)[1] == ({"window": 128} if options else {})
    model = make(attention=name, options=options, block_size=300)
    layer = model.layers[0].attention
    assert type(layer).__module__ == name and model.new_caches()[0].size == (3 if options else 300)
    q, k = torch.randn(2, 1, 2, 300, 8, dtype=torch.float64)
    assert (layer.weights(q, k)[0, 0, 8] > 0).nonzero().flatten().tolist() == kept_by_8
    for kernel in ("engine", "flex"):
        assert contract.error(layer, kernel, 300) < 1e-10
    assert contract.decoding_error(layer, 310, 40, 1) < 1e-12
    assert name == "my_alibi" or layer.multiplied_pairs(300) < 300 * (128 + 64 + 64 + 3)
    save(tmp_path / "ckpt.pt", {"model": model.float().state_dict(), "model_config": vars(model.config)})
    again, _ = load(tmp_path / "ckpt.pt")
    idx = torch.randint(50, (1, 16))
    torch.testing.assert_close(again(idx)[0], model(idx)[0])
    sys.modules.pop(name)


def test_checkpoints_are_whole_or_refused(tmp_path):
    model = GPT(GPTConfig(**SMALL))
    path = tmp_path / "ckpt.pt"
    save(path, {"model": model.state_dict(), "model_config": vars(model.config)})
    again, _ = load(path, dropout=0.1)
    assert again.config.dropout == 0.1 and not again.training
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text", whole[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or not a checkpoint"):
            load(path)
    save(path, {"model": GPT(GPTConfig(**{**SMALL, "n_layer": 3})).state_dict(), "model_config": vars(model.config)})
    said = "not those of the model as it is built now .only the file has layers.2.*the model was edited"
    with pytest.raises(UserError, match=said):
        load(path)
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="could not write"):
        save(tmp_path / "missing" / "ckpt.pt", {})
