"""data/recall: its answers are right and as far as promised, only they count, and whole sequences are read."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_runs import assert_same_runs, fit, log_of

from core import evaluation, prepare, readers
from core.config import UserError
from core.dataset import Dataset, batches
from core.evaluation import evaluate
from core.launch import explain_log
from core.meta import check_meta, files_of
from data.recall import prepare as recall
from model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("quick")
SIZES = ("--train=1100", "--val=40", "--test=30")


def make(folder, *options):
    recall.main(["--out_dir", str(folder), *SIZES, *options])
    return Dataset(folder)


def words_of(data, split):
    """[(words of a sequence without the mark, their distances), ...]"""
    offsets, tokens, distances = data.offsets(split), data.tokens(split), data.distances(split)
    vocab = np.array(data.meta["vocab"])
    assert (tokens[offsets[:-1]] == 0).all() and (distances[offsets[:-1]] == 0).all()
    return [(vocab[tokens[a + 1 : b]].tolist(), distances[a + 1 : b].tolist()) for a, b in zip(offsets, offsets[1:])]


def check_sequence(words, distances, options):
    """Read a sequence word by word: only the values behind queries count, at the distance back to their pair."""
    values, places, asked = {}, {}, 0
    for n in range(options["pairs"]):
        pair = "".join(words[n : n + 1] if options["joined"] else words[2 * n : 2 * n + 2])
        key, value = re.fullmatch(r"(k\d+)(v\d+)", pair).groups()
        assert key not in values
        values[key], places[key] = value, n if options["joined"] else 2 * n + 1
    start = 1 + max(places.values())
    assert not any(distances[:start])
    for n in range(start, len(words) - 1, 2):
        key, value = words[n : n + 2]
        if key == ".":
            assert value == "." and distances[n : n + 2] == [0, 0]
        else:
            asked += 1
            assert value == values[key] and distances[n : n + 2] == [0, n - places[key]]
    assert asked == options["queries"] == sum(d > 0 for d in distances)


@pytest.mark.parametrize("options", [(), ("--pairs=3", "--queries=4", "--length=20", "--keys=3", "--near=0.1"),
                                     ("--pairs=1", "--queries=1", "--length=3", "--values=30", "--keys=70"),
                                     ("--joined=0", "--length=51")])
def test_answers_are_right(tmp_path, options):
    data = make(tmp_path / "recall", *options)
    chosen = data.meta["options"]
    keys, values = chosen["keys"], chosen["values"]
    assert data.vocab_size == 2 + keys + values + chosen["joined"] * keys * values
    for split, count in (("train", 1100), ("val", 40), ("test", 30)):
        sequences = words_of(data, split)
        assert len(sequences) == count == data.splits[split]["documents"]
        for words, distances in sequences:
            assert len(words) == chosen["length"]
            check_sequence(words, distances, chosen)
        text = data.tokenizer.decode_bytes(data.tokens(split).tolist())
        assert data.splits[split]["bytes"] == len(text)
        assert data.splits[split]["answers"] == (data.distances(split) > 0).sum()


def test_distances_are_as_promised():
    """With near = 1 each place is as likely as any other; a small one prefers the first places, as in the paper."""
    options = SimpleNamespace(length=42, pairs=2, queries=2, keys=9, values=9, near=1.0, joined=1)
    found = {}
    for near in (1.0, 0.01):
        options.near = near
        tokens, distances = recall.sequences(np.random.default_rng(0), 4000, options)
        assert distances.max() == 41 - 1 and distances[distances > 0].min() == 1
        places = np.nonzero(distances)[1].reshape(-1, 2) // 2 - 2  # of the two answers of each sequence, from 0
        found[near] = np.bincount(places.ravel(), minlength=20) / 4000
    assert found[1.0] == pytest.approx(np.full(20, 0.1), abs=0.02)
    weights = np.arange(1, 21) ** -0.99
    p = weights / weights.sum()
    expected = [p[s] + sum(p[t] * p[s] / (1 - p[t]) for t in range(20) if t != s) for s in range(20)]  # first or second
    assert found[0.01] == pytest.approx(expected, abs=0.025)


def test_the_same_seed_gives_the_same_bytes(tmp_path, capsys):
    one, other, third = (make(tmp_path / name, *options)
                         for name, options in (("a", ()), ("b", ()), ("c", ("--seed=2",))))
    assert one.digests == other.digests and one.source == other.source != third.source
    assert len(set(one.digests.values()) & set(third.digests.values())) == 3  # offsets alone
    pinned = make(tmp_path / "d", "--pairs=3", "--queries=3", "--length=16", "--keys=4", "--values=9", "--seed=1",
                  "--joined=0", "--near=1.0")
    words, distances = words_of(pinned, "val")[0]
    assert " ".join(words) == "k3 v6 k0 v3 k2 v0 . . k2 v0 . . k2 v0 k3 v6"
    assert [d for d in distances if d] == [3, 7, 13]
    before = (tmp_path / "a" / "train.bin").stat().st_mtime_ns
    make(tmp_path / "a")
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "a" / "train.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("options, message", [
    (("--pairs=9", "--keys=8", "--length=64"), "--pairs must be at most --keys=8, for no key is in two pairs; got 9"),
    (("--length=19",), "--length must be at least 20 for --pairs=4 and two tokens for each of --queries=8; got 19"),
    (("--length=23", "--joined=0"), "--length must be at least 24"), (("--joined=2",), "--joined must be from 0 to 1"),
    (("--pairs=0",), "--pairs must be from 1 to"), (("--near=0",), "--near must be from 0.001 to 10.0, got 0.0"),
    (("--near=nan",), "--near must be"), (("--train=0",), "--train must be from 1"),
    (("--seed=-1",), "--seed must be from 0"),
    (("--length=70000",), "--length must be from 3 to 65,534, got 70,000"), (("--source=.",), "takes no --source"),
])
def test_what_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        recall.main(["--out_dir", str(tmp_path / "x"), *options])
    assert not (tmp_path / "x").exists()


# ---- the loss counts the answers alone ---------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, vocab_size=7, tie=False)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@pytest.fixture
def small(tmp_path):
    return make(tmp_path / "small", "--pairs=3", "--queries=3", "--length=16", "--keys=3", "--values=2", "--joined=0")


def by_hand(model, data, split):
    """(loss, [(distance, right), ...]) of a split, an answer at a time."""
    losses, answers = [], []
    for words, distances in words_of(data, split):
        ids = [0] + data.tokenizer.encode(" ".join(words))
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0][0].double()
        for n, distance in enumerate(distances):
            if distance:
                p = torch.softmax(logits[n], -1)
                losses.append(-math.log(p[ids[n + 1]]))
                answers.append((distance, int(p.argmax()) == ids[n + 1]))
    return sum(losses) / len(losses), answers


def test_scores_are_those_of_the_answers(model, small):
    loss, answers = by_hand(model, small, "val")
    scores, p = evaluate(model, small, "val", 7, "cpu", "float32")
    assert p is None and scores.keys() == {"loss", "accuracy", "accuracy_by_distance"}
    assert scores["loss"] == pytest.approx(loss, rel=1e-5) and len(answers) == 120
    assert 0 < scores["accuracy"] == pytest.approx(sum(right for _, right in answers) / 120)
    expected = [[d, np.mean([right for e, right in answers if e == d])] for d in sorted({d for d, _ in answers})]
    assert scores["accuracy_by_distance"] == [[d, pytest.approx(share)] for d, share in expected]
    json.dumps(scores)  # plain values


def test_the_log_says_that_the_loss_is_of_answers(small, capsys):
    explain_log(SimpleNamespace(log_interval=1, eval_interval=2), small, 3)
    assert "the loss of its batch in nats per answer;" in capsys.readouterr().out


def test_the_training_loss_is_of_the_answers(model, small):
    """Other tokens change no gradient through the targets, and parts of a batch weigh by their answers."""
    source = batches(small, "train", 6, 16, seed=3)
    x, y, lengths = source.batch(2)
    rows = source.rows(2)
    assert x.shape == y.shape == (6, 16) and lengths is None and (x[:, 0] == 0).all()
    counted = y[:, :-1] >= 0
    assert torch.equal(y >= 0, torch.from_numpy(source.distances_of(rows) > 0))
    assert torch.equal(y[:, :-1][counted], x[:, 1:][counted])
    loss = model(x, y)[1]
    parts = [source.batch(2, part, 4) for part in range(4)]
    shares = [source.share(2, part, 4) for part in range(4)]
    assert sum(shares) == pytest.approx(1) and len(set(shares)) > 1
    assert sum(s * model(*part[:2])[1] for s, part in zip(shares, parts)).item() == pytest.approx(loss.item(), rel=1e-5)
    again = batches(small, "train", 6, 16, seed=3)
    assert torch.equal(again.batch(2)[0], x) and not torch.equal(again.batch(3)[0], x)


def test_the_order_in_which_ranks_are_done_changes_no_bit(model, small, monkeypatch):
    alone = evaluate(model, small, "val", 4, "cpu", "float32")[0]
    monkeypatch.setattr(evaluation.dist, "all_gather",
                        lambda found: [{n: part for n, part in found.items() if n % 3 == rank} for rank in (2, 0, 1)])
    assert evaluate(model, small, "val", 4, "cpu", "float32")[0] == alone


def test_a_run_is_resumed_exactly(small, tmp_path, capsys):
    assert not fit(tmp_path / "whole", small.folder, "--max_iters=10", "--dropout=0.1")
    more = "--lr_decay_iters=10", "--dropout=0.1"
    assert not fit(tmp_path / "parts", small.folder, "--max_iters=5", *more)
    assert not fit(tmp_path / "parts", small.folder, "--max_iters=10", *more, "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    last = log_of(tmp_path / "whole", "val")[-1]
    assert last["whole"] and len(last["accuracy_by_distance"]) > 5
    assert f"accuracy {last['accuracy']:.4f}" in capsys.readouterr().out


# ---- documents of any length -------------------------------------------------------------------


def write(folder, documents, distances=None, **more):
    """A set of whole documents of bytes; `distances` of each token, in a list for each document."""
    tokens = np.frombuffer("".join(documents).encode(), np.uint8)
    split = {"tokens": tokens, "bytes": len(tokens), "documents": len(documents),
             "offsets": np.cumsum([0] + [len(text) for text in documents])}
    if distances:
        split["distances"] = np.concatenate(distances)
    meta = {"name": "documents", "kind": "lm", "whole_documents": True, "tokenizer": "bytes", "vocab_size": 256,
            "mark": None,
            "lossless": True, "partial": False, "options": {}, "source": {"file": "documents"},
            "split_rule": "as given"}
    prepare.write(folder, {**meta, **more}, {"train": split, "val": split})
    return Dataset(folder)


def test_documents_are_read_whole(tmp_path):
    data = write(tmp_path / "x", ["abcd", "ef", "ghi"])
    source = batches(data, "train", 3, 8)
    x, y, _ = source.read(source.all_rows())
    assert x.tolist() == [[97, 98, 99], [101, 102, 0], [103, 104, 105]]
    assert y.tolist() == [[98, 99, 100], [102, -1, -1], [104, 105, -1]]
    assert source.targets([0, 2]) == 5 and source.share(0, 0, 1) == 1.0
    drawn = np.concatenate([source.rows(n) for n in range(100)])
    assert np.bincount(drawn).min() > 70
    with pytest.raises(UserError, match="must not be cut: block_size must be at least 3, got 2"):
        batches(data, "train", 3, 2)


def test_a_mask_of_its_own(tmp_path):
    data = write(tmp_path / "x", ["abcd", "ef"], [[9, 0, 2, 3], [0, 1]])  # a first token is no target
    source = batches(data, "train", 2, 8)
    assert source.read([0, 1])[1].tolist() == [[-1, 99, 100], [102, -1, -1]] and source.targets([0, 1]) == 3
    assert source.distances_of([0, 1]).tolist() == [[0, 2, 3], [1, 0, 0]]
    empty = write(tmp_path / "y", ["abcd", "ef"], [[0, 1, 0, 0], [1, 0]])
    with pytest.raises(UserError, match="document 1 of the train split of .* has no token to predict"):
        batches(empty, "train", 2, 8)


def test_meta_of_whole_documents(tmp_path):
    meta = write(tmp_path / "x", ["abcd", "ef"], [[0, 0, 2, 3], [0, 1]]).meta
    assert files_of(meta)["val.distances.bin"] == (12, meta["splits"]["val"]["distances_sha256"])
    lacking = {key: value for key, value in meta["splits"]["val"].items() if key != "offsets_sha256"}
    for forged, message in (({**meta, "whole_documents": 1}, "bool as whole_documents"),
                            ({**meta, "kind": "classify", "classes": ["a", "b"]},
                             "whole_documents for kind 'lm' alone"),
                            ({**meta, "splits": {"val": lacking}}, "offsets_sha256 of val, whose documents are whole")):
        with pytest.raises(UserError, match=message):
            check_meta(forged, "x")


@pytest.mark.parametrize("value, is_valid",
                         [([[1, 0.5], [9, 1]], True), ([], True), ([[1, 1.5]], False), ([[1]], False),
                          ([[0.5, 1.0]], False), ("x", False), (None, False)])
def test_records_hold_valid_accuracies(value, is_valid):
    line = json.dumps({"step": 1, "split": "val", "loss": 1.0, "accuracy_by_distance": value})
    assert ("accuracy_by_distance" in readers.parse_record(line)) == is_valid
