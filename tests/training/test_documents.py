"""document_mask and align_documents: each document is read as if alone, in training, evaluation and decoding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from training_runs import HARD, assert_same_runs, fit

from core.config import UserError
from core.dataset import Dataset, batches
from core.texts import document_starts, window_starts
from model import GPT, GPTConfig, load

pytestmark = pytest.mark.usefixtures("quick")
MASK = ("--task=lm", "--document_mask=True", "--align_documents=True")


def make(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=16, document_mask=True, document_mark=7)
    model = GPT(GPTConfig(**{**shape, **changes})).double().eval()
    for p in model.parameters():  # far from the start, where all outputs look alike
        torch.nn.init.normal_(p, std=0.3)
    return model


def text_of(*lengths, seed=0):
    """One text (1, T) of documents of these lengths, each of which begins with the mark 7."""
    torch.manual_seed(seed)
    idx = torch.randint(8, 50, (1, sum(lengths)))
    idx[0, np.cumsum((0, *lengths[:-1]))] = 7
    return idx


def test_document_starts():
    idx = torch.tensor([[3, 7, 3, 3, 7, 7, 3], [7, 3, 3, 3, 3, 3, 3]])
    assert document_starts(idx, 7).tolist() == [[0, 1, 1, 1, 4, 5, 5], [0] * 7]
    assert document_starts(idx, 7, 10, torch.tensor([[4], [2]])).tolist() == [[4, 11, 11, 11, 14, 15, 15], [10] * 7]


@pytest.mark.parametrize("kernel", ["engine", "sdpa", "reference"])
def test_a_document_is_read_as_if_alone(kernel):
    """With rotary positions, the logits of a document amid others are those of the document by itself, up to the
    rounding of float32 angles."""
    model, idx = make(kernel=kernel), text_of(5, 1, 18, 8)
    with torch.no_grad():
        logits = model(idx, targets=idx)[0]
        for a, b in ((0, 5), (5, 6), (6, 24), (24, 32)):
            assert (logits[:, a:b] - model(idx[:, a:b], targets=idx[:, a:b])[0]).abs().max() < 1e-5
        model.config.document_mask = False
        assert (model(idx, targets=idx)[0] - logits)[:, 6:].abs().max() > 1e-3


def test_both_directions():
    """In a classifier, a text of two documents; other texts of the batch and their padding change nothing."""
    model, first, second = make(n_class=2), text_of(9, 11), text_of(6, 4, seed=1)
    x = torch.cat([first, torch.nn.functional.pad(second, (0, 10), value=7)])  # padded with the mark itself
    with torch.no_grad():
        logits = model(x, lengths=torch.tensor([20, 10]))[0]
        for n, text in enumerate((first, second)):
            torch.testing.assert_close(logits[n], model(text)[0][0], rtol=0, atol=1e-12)
        map = model.maps(first)[0]
    assert map[:, :, :9, 9:].abs().max() == map[:, :, 9:, :9].abs().max() == 0
    assert map[:, :, :9, :9].min() > 0


SHARED = {"n_kv_head": 1, "attention_sink": True, "pos": "none"}  # without rotations, whose angles are float32


@pytest.mark.parametrize("changes", [
    {"attention": "sparse", "options": {"window": 12}},
    {"attention": "sparse", "options": {"window": 12, "global_tokens": 3}, **SHARED},
    {"attention": "forgetting", "options": {"forgetting_spans": [3.0, 20.0]}, **SHARED},
], ids=["window", "first tokens, sink, shared keys", "gates, sink, shared keys"])
def test_decoding_continues_the_document(changes):
    """The texts of a batch begin documents at different tokens: each token is the one that the full pass gives."""
    model = make(**changes)
    text = torch.cat([text_of(3, 4), text_of(2, 5, seed=1)])
    text = model.generate(text, 70, temperature=0)
    with torch.no_grad():
        full = model(text, targets=text)[0]
        torch.testing.assert_close(text[:, 7:], full.argmax(-1)[:, 6:-1])
        caches = model.new_caches()
        idx = torch.cat([text_of(6, 20, 9, 40), text_of(70, 2, 1, 2, seed=1)])
        expected, at = model(idx, targets=idx)[0], 0
        for n in (10, 1, 7, *[1] * 57):
            at += n
            logits = model(idx[:, at - n : at], caches=caches)[0]
            assert (logits[:, 0] - expected[:, at - 1]).abs().max() < 1e-12


def test_stopped_and_resumed_equals_unbroken(reviews, tmp_path):
    """Also the score: each step reads the same windows. The checkpoint holds the mask, and decodes with it."""
    assert not fit(tmp_path / "whole", reviews, *MASK, *HARD)
    assert not fit(tmp_path / "cut", reviews, *MASK, *HARD, "--max_iters=5")
    assert not fit(tmp_path / "cut", reviews, "--task=lm", "--align_documents=True", *HARD, "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    config = load(tmp_path / "cut" / "ckpt.pt")[0].config
    assert config.document_mask and config.document_mark == 0
    assert not fit(tmp_path / "plain", reviews, *HARD, "--task=lm")
    one, other = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("whole", "plain"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_older_checkpoints_have_no_mask(reviews, tmp_path):
    """A checkpoint from before the setting loads, with the same logits."""
    assert not fit(tmp_path / "run", reviews, "--task=lm", "--max_iters=1")
    path, idx = tmp_path / "run" / "ckpt.pt", torch.arange(16)[None] % 3
    model, checkpoint = load(path)
    for name in ("document_mask", "document_mark"):
        checkpoint["model_config"].pop(name)
    checkpoint.pop("sealed", None)
    torch.save(checkpoint, path)
    with torch.no_grad():
        assert torch.equal(load(path)[0](idx, idx)[0], model(idx, idx)[0])


def test_parts_of_an_aligned_batch(reviews):
    """The ranks' parts are together the batch of one; windows begin where documents do."""
    data = Dataset(reviews, "lm")
    source = batches(data, "train", 6, 8, 1, True)
    for number in range(20):
        whole, parts = source.batch(number)[0], [source.batch(number, n, 3)[0] for n in range(3)]
        assert torch.equal(whole, torch.stack([parts[n % 3][n // 3] for n in range(6)]))
        assert sum(source.share(number, n, 3) for n in range(3)) == pytest.approx(1)
    for align in (True, False):  # no review is longer than 128 tokens; 0 is the mark
        source = batches(data, "train", 6, 128, 1, align)
        assert (torch.cat([source.batch(n)[0][:, 0] for n in range(20)]) == 0).all() == align


def test_window_starts():
    marks = np.zeros(20, np.uint8)
    marks[[2, 5, 17]] = 7
    assert window_starts(marks, 7, 4).tolist() == [0, 2, 5, 9, 13, 17]
    assert window_starts(np.array([7, 1, 7]), 7, 4).tolist() == [0]  # the last token predicts none
    assert window_starts(np.array([1, 1]), 7, 1).tolist() == [0]


@settings(deadline=None, max_examples=60)
@given(strategies.lists(strategies.sampled_from([7, 1, 1, 1, 2]), min_size=2, max_size=60), strategies.integers(1, 9))
def test_aligned_windows_cover_every_token(tokens, size):
    """Every token but the first is predicted by a window that begins in its own document or ends the one before."""
    starts = window_starts(np.array(tokens), 7, size)
    covered = {at for start in starts for at in range(start + 1, start + size + 1)}
    assert covered >= set(range(1, len(tokens)))
    assert {n for n, token in enumerate(tokens[:-1]) if token == 7} | {0} <= set(starts.tolist())
    assert len(set(starts.tolist())) == len(starts) and starts.max() < len(tokens) - 1


def test_refused():
    with pytest.raises(UserError, match="this data has none"):
        make(document_mark=None)
    with pytest.raises(UserError, match="document_mask expects model=gpt, got bilstm"):
        GPTConfig(model="bilstm", n_class=2, attention="additive", document_mask=True, document_mark=0).check()
