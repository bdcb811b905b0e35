"""Occlusion says which words move a classifier's answer, and in which direction."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from core import explain
from model import GPT, GPTConfig

WORDS = SimpleNamespace(kind="words", mark=0, token=str, decode_bytes=lambda ids: f" {ids[0]}".encode())


class Bag(nn.Module):
    """Logits are the sum of a row of weights for each token; it counts the texts that it reads."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.batches = weights, []

    def forward(self, x, lengths):
        self.batches.append(len(x))
        is_token = torch.arange(x.size(1)) < lengths[:, None]
        return (self.weights[x] * is_token[..., None]).sum(1), None


def test_occlusion_by_hand():
    """The log-odds of the predicted class with the word minus without it; the mark is never left out."""
    model = Bag(torch.tensor([[0.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 0.5]]))
    ids = torch.tensor([0, 1, 2, 3])
    assert explain.occlusion(model, ids, [1, 1, 1, 1], mark=0).tolist() == pytest.approx([0, 3, -2, 0.5])
    assert explain.occlusion(model, ids, [1, 2, 1], mark=0).tolist() == pytest.approx([0, 1, 0.5])  # two tokens a word
    assert explain.occlusion(model, torch.tensor([0, 2, 3]), [1, 1, 1], 0).tolist() == pytest.approx([0, 2, -0.5])
    assert explain.occlusion(model, torch.tensor([1]), [1]).tolist() == [0]  # nothing would remain


def test_occlusion_of_more_classes():
    model = Bag(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0]]))
    p = torch.softmax(torch.tensor([[2.0, 0.0, 4.0], [1.0, 0.0, 2.0]], dtype=torch.float64), 1)[:, 2]
    log_odds = (p / (1 - p)).log()
    expected = [(log_odds[0] - log_odds[1]).item()] * 2
    assert explain.occlusion(model, torch.tensor([1, 1]), [1, 1]).tolist() == pytest.approx(expected, rel=1e-5)


def test_long_texts_are_read_in_batches():
    model = Bag(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(5, (100,), generator=torch.Generator().manual_seed(1))
    changes = explain.occlusion(model, ids, [1] * 100)
    assert max(model.batches) == explain.BATCH and sum(model.batches) == 101
    for token in range(5):  # a bag has no order
        assert changes[ids == token].std() < 1e-4


def test_shades_of_changes():
    """From -1 to 1 by the largest change; changes too small to matter stay pale."""
    assert explain.shades("occlusion", [2.0, -1.0, 0.0]) == [1, -0.5, 0]
    assert max(explain.shades("occlusion", [explain.SMALLEST / 10, 0.0])) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def trained():
    """A classifier of texts by whether they hold more tokens 5 (class 1) or 6; the other tokens mean nothing."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=16, n_class=2)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(300):
        x = torch.randint(7, 20, (32, 12))
        x[:, 0], y = 0, torch.randint(2, (32,))
        places = 1 + torch.rand(32, 11).argsort(1)[:, : 3 - 2 * (step % 2)]  # one such token, or two against one
        x.scatter_(1, places, torch.stack([6 - y, 5 + y, 6 - y], 1)[:, : places.size(1)])
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model.eval()


@pytest.mark.parametrize("token", [5, 6])
@pytest.mark.parametrize("place", [1, 4, 11])
def test_the_word_that_decides_is_shaded_most(trained, token, place):
    x = torch.randint(7, 20, (1, 12), generator=torch.Generator().manual_seed(place))
    x[0, 0], x[0, place] = 0, token
    words, scores = explain.word_scores("occlusion", trained, WORDS, x, torch.tensor([12]))
    shades = explain.shades("occlusion", scores)
    assert words[place] == str(token) and shades.pop(place) == 1 and max(map(abs, shades)) < 0.5


def test_words_against_the_answer_have_the_other_sign(trained):
    x = torch.tensor([[0, 8, 5, 9, 5, 10, 6, 11, 13, 12]])
    assert trained(x)[0].argmax() == 1
    _, scores = explain.word_scores("occlusion", trained, WORDS, x, torch.tensor([10]))
    assert min(range(10), key=scores.__getitem__) == 6 and scores[6] < 0 < min(scores[2], scores[4])


def test_padding_changes_nothing(trained):
    """Texts of different lengths share batches: the change of a word is as if it stood alone."""
    ids = torch.tensor([0, 8, 5, 9])
    batched = explain.occlusion(trained, ids, [1, 2, 1], 0)
    alone = [trained(text[None])[0][0] for text in (ids, ids[[0, 3]], ids[[0, 1, 2]])]
    log_odds = [(logits[1] - logits[0]).item() for logits in alone]
    assert batched.tolist() == pytest.approx([0, log_odds[0] - log_odds[1], log_odds[0] - log_odds[2]], abs=1e-5)
