"""The recurrent baselines: padding is not read, attention as its formula says, training and what is refused."""

import numpy as np
import pytest
import torch

import sample
import train
from core import explain
from core.config import UserError
from helpers import call
from model import GPTConfig, load, new_model

KINDS = ("none", "additive", "multihead", "sparse", "atrt")


def make(attention, **more):
    torch.manual_seed(0)
    config = GPTConfig(**{"model": "bilstm", "attention": attention, "vocab_size": 20, "n_embd": 6, "n_head": 2,
                          "n_layer": 1,
                          "n_class": 2, "pool": "max", "options": {"hidden": 4}, "block_size": 16, **more})
    return new_model(config).double().eval()


def batch():
    torch.manual_seed(1)
    lengths = torch.tensor([9, 3, 1, 6])
    x = torch.randint(1, 20, (4, 9))
    return x.masked_fill(torch.arange(9) >= lengths[:, None], 0), lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_padding_is_neither_read_nor_pooled(kind, pool):
    """A text alone and among longer ones has the same logits; what stands in its padding changes nothing."""
    model, (x, lengths) = make(kind, pool=pool), batch()
    together = model(x, lengths=lengths)[0]
    alone = torch.cat([model(x[n : n + 1, :length])[0] for n, length in enumerate(lengths)])
    other = model(x.masked_fill(torch.arange(9) >= lengths[:, None], 7), lengths=lengths)[0]
    assert (together - alone).abs().max() < 1e-12 and (together - other).abs().max() == 0
    assert (together[0] - together[1]).abs().max() > 1e-4


def test_reads_as_pytorch_reads_packed_texts():
    """Outputs and the gradients of all weights are those of a bidirectional nn.LSTM of packed texts, layer by layer."""
    model, (idx, lengths) = make("none", n_layer=2), batch()
    packed = torch.nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True).double()
    for n in range(2):
        for part, ending in ((model.onward[n], ""), (model.back[n], "_reverse")):
            for name, weight in part.named_parameters():
                getattr(packed, name[:-1] + f"{n}{ending}").data = weight.data
    x = torch.nn.utils.rnn.pack_padded_sequence(model.embedding(idx), lengths, batch_first=True, enforce_sorted=False)
    expected = torch.nn.utils.rnn.pad_packed_sequence(packed(x)[0], batch_first=True)[0]
    found = model.read(idx, lengths).masked_fill((torch.arange(9) >= lengths[:, None])[..., None], 0)
    assert (found - expected).abs().max() < 1e-12
    (expected * torch.arange(8)).sum().backward()
    theirs = {name: weight.grad for name, weight in packed.named_parameters()}
    embedded, model.embedding.weight.grad = model.embedding.weight.grad, None
    (found * torch.arange(8)).sum().backward()
    assert (model.embedding.weight.grad - embedded).abs().max() < 1e-12
    for n in range(2):
        for part, ending in ((model.onward[n], ""), (model.back[n], "_reverse")):
            for name, weight in part.named_parameters():
                assert (weight.grad - theirs[name[:-1] + f"{n}{ending}"]).abs().max() < 1e-12


def test_additive_by_hand():
    """softmax over tokens of c . tanh(W h + b), and the logits of the sum of outputs so weighted."""
    model, (x, lengths) = make("additive"), batch()
    h = model.read(x[3:4, :6], lengths[3:4])[0]  # (6, 8)
    scores = torch.stack([model.context @ torch.tanh(model.inner.weight @ one + model.inner.bias) for one in h])
    weights = torch.exp(scores) / torch.exp(scores).sum()
    expected = model.head.weight @ sum(w * one for w, one in zip(weights, h)) + model.head.bias
    assert (model(x, lengths=lengths)[0][3] - expected).abs().max() < 1e-12
    (shown,) = model.maps(x, lengths)
    assert shown.shape == (4, 1, 1, 9) and (shown[3, 0, 0, :6] - weights).abs().max() < 1e-12
    assert shown[1, 0, 0, 3:].abs().max() == 0
    assert torch.equal(explain.attention_weights(model, x, lengths), shown[:, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_attention_weights(kind):
    model, (x, lengths) = make(kind), batch()
    weights, maps = explain.attention_weights(model, x, lengths), model.maps(x, lengths)
    there = torch.arange(9) < lengths[:, None]
    assert weights.shape == (4, 9) and (weights.sum(1) - 1).abs().max() < 1e-6 and weights[~there].abs().max() == 0
    assert len(maps) == (kind != "none")
    if kind not in ("none", "additive"):
        assert maps[0].shape == (4, 2, 9, 9)
        received = sum(maps[0][3, :, i] for i in range(6)).mean(0) / 6
        assert (weights[3] - received / received.sum()).abs().max() < 1e-6
    if kind == "none":  # the share of channels whose largest output the token has
        h = model.read(x, lengths)[0]
        assert torch.equal(weights[0], torch.bincount(h.argmax(0), minlength=9) / h.size(1))


def test_multihead_is_dense_attention():
    multihead, dense = make("multihead"), make("dense")
    dense.load_state_dict(multihead.state_dict())
    x, lengths = batch()
    assert torch.equal(multihead(x, lengths=lengths)[0], dense(x, lengths=lengths)[0])
    h = multihead.read(x[:1], lengths[:1])
    layer = multihead.attention
    q, k, v = layer.project(h)
    y = layer.proj((layer.weights(q, k) @ v).transpose(1, 2).reshape(1, 9, 8)).amax(1)
    assert (multihead.head(y) - multihead(x[:1])[0]).abs().max() < 1e-10


def test_work_is_what_the_products_cost():
    """Counted by PyTorch itself in a forward pass, three times for training."""
    from torch.utils.flop_counter import FlopCounterMode

    for kind in ("none", "additive"):
        model = make(kind)
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(3, 7, dtype=torch.long))
        head, vector = 2 * 3 * 2 * 8, 21 * 2 * 8 * (kind == "additive")  # products with a vector are not in the counter
        assert 3 * (counter.get_total_flops() - head
                    + vector) == pytest.approx(model.estimate_flops(7) * 21, rel=1e-6), kind


@pytest.mark.parametrize("attention", ["none", "additive", "multihead", "sparse"])
def test_trains_resumes_and_samples(attention, reviews, tmp_path, quick, capsys):
    arguments = ["--model=bilstm", f"--attention={attention}", f"--dataset={reviews}", f"--out_dir={tmp_path / 'out'}",
                 "--hidden=8",
                 "--n_embd=8", "--n_layer=1", "--n_head=2", "--block_size=40", "--batch_size=8", "--eval_iters=0",
                 "--pool=max",
                 "--eval_interval=20", "--learning_rate=0.03", "--warmup_iters=2", "--eval_test=True",
                 "--dtype=float32"]
    call(train, *arguments, "--max_iters=20")
    call(train, *arguments, "--max_iters=40", "--init_from=resume")
    model, checkpoint = load(tmp_path / "out" / "best.pt")
    assert checkpoint["model_config"]["model"] == "bilstm" and model.config.options["hidden"] == 8
    with np.load(tmp_path / "out" / "predictions-test.npz") as found:
        assert found["p"].shape == found["label"].shape == (9,) and ((found["p"] > 0.5) == found["label"]).mean() > 0.8
    capsys.readouterr()
    call(sample, f"--out_dir={tmp_path / 'out'}", "--start=51: so good a film", "--dtype=float32")
    assert capsys.readouterr().out.startswith("positive ")


@pytest.mark.parametrize("change, said", [
    ({"n_class": 0}, "train a classifier, or use model=gpt"),
    ({"pos": "learned"}, "a BiLSTM has no pos"),
    ({"norm": "layernorm"}, "a BiLSTM has no norm"),
    ({"attention": "aditive"}, "unknown attention 'aditive'; did you mean additive?"),
    ({"options": {"hidden": 0}}, "hidden must be at least 1"),
    ({"options": {"hidden": 4}, "n_head": 3}, "a multiple of n_head = 3, got 4"),
    ({"options": {"hiden": 4}}, "no option hiden; did you mean hidden?"),
    ({"model": "lstm"}, "unknown model 'lstm'; did you mean bilstm?"),
])
def test_refused(change, said):
    with pytest.raises(UserError) as error:
        make(**{"attention": "none", **change})
    assert said in str(error.value)
