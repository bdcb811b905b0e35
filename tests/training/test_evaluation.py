"""What an evaluation looks at and what it chooses: the split, the batches, bytes, and the best weights."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from training_runs import SMALL, assert_same, evaluate_again, fit, log_of, scores_of

import train
from core import evaluation, prepare
from core.dataset import Dataset, TextBatches, batches
from core.evaluation import evaluate
from helpers import in_order, review, write_bytes, write_reviews
from model import GPT, GPTConfig, load

pytestmark = pytest.mark.usefixtures("quick")


def mean_loss(model, groups):
    """The mean over all targets of some batches, in nats."""
    with torch.no_grad():
        pairs = [(model(x, y, lengths)[1].item(), (y != -1).sum().item()) for x, y, lengths in groups]
    return sum(loss * n for loss, n in pairs) / sum(n for _, n in pairs)


@pytest.fixture
def umlauts(tmp_path):
    """Running text by characters, of one, two and three bytes; validation has more of them than training."""
    vocab, random, splits = ["a", "b", "ä", "…"], np.random.default_rng(0), {}
    shares = {"train": (0.5, 0.4, 0.1, 0.0), "val": (0.1, 0.2, 0.3, 0.4), "test": (0, 0, 0.5, 0.5)}
    for name, n in (("train", 400), ("val", 203), ("test", 97)):
        tokens = random.choice(4, n, p=shares[name])
        splits[name] = {"tokens": tokens, "bytes": len("".join(vocab[t] for t in tokens).encode())}
    meta = {"name": "umlauts", "kind": "lm", "tokenizer": "chars", "vocab_size": 4, "vocab": vocab, "mark": None,
            "lossless": True, "partial": False, "options": {}, "source": {"file": "umlauts"}, "split_rule": "as given"}
    prepare.write(tmp_path / "umlauts", meta, splits)
    return tmp_path / "umlauts"


def test_bits_per_byte_where_a_token_is_several_bytes(umlauts, tmp_path):
    """Nats of all tokens, in bits, over the bytes of the judged split itself."""
    assert not fit(tmp_path / "out", umlauts, "--max_iters=2", "--eval_test=True")
    model, _ = load(tmp_path / "out" / "best.pt")
    data, records = Dataset(umlauts), [r for r in log_of(tmp_path / "out") if "whole" in r]
    for record, split in zip(records, ("val", "test"), strict=True):
        tokens = data.tokens(split)
        size = len("".join("ab\u00e4\u2026"[t] for t in tokens).encode())
        assert size > 1.5 * len(tokens)
        nats = mean_loss(model, in_order(batches(data, split, 4, 16)))
        assert record["split"] == split and record["loss"] == pytest.approx(nats, rel=1e-6)
        assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) * len(tokens) / size, rel=1e-6)


def test_validation_is_of_the_validation_split(tmp_path):
    """The text of validation is unlike training's: what is learnt of the one makes the other worse, and step 0 was
    best."""
    data = write_bytes(tmp_path / "data", train="abcab" * 200, val="xyzzy" * 20)
    assert not fit(tmp_path / "out", data, "--max_iters=10", "--eval_iters=0", "--learning_rate=3e-2", "--tie=False")
    records = log_of(tmp_path / "out", "val")
    losses = [r["loss"] for r in records if "whole" not in r]
    assert len(losses) == 3 and min(losses[1:]) > losses[0] + 0.1
    last, best = (load(tmp_path / "out" / name)[0] for name in ("ckpt.pt", "best.pt"))
    source = batches(Dataset(data), "val", 4, 16)
    assert losses[-1] == pytest.approx(mean_loss(last, in_order(source)), rel=1e-6)
    assert losses[0] == pytest.approx(mean_loss(best, in_order(source)), rel=1e-6)
    assert torch.load(tmp_path / "out" / "best.pt")["state"]["best_step"] == records[-1]["step"] == 0
    assert records[-1]["whole"] and records[-1]["loss"] == losses[0]


def test_a_classifiers_best_is_the_most_accurate(reviews, tmp_path, monkeypatch):
    scores = iter([(0.5, 1.0), (0.75, 2.0), (0.6, 0.5)])  # the loss is least where the accuracy is not best

    def told(*arguments):
        accuracy, loss = next(scores)
        return {"loss": loss, "accuracy": accuracy}, None

    monkeypatch.setattr(train, "evaluate", told)
    assert not fit(tmp_path, reviews, "--max_iters=10")
    state = torch.load(tmp_path / "ckpt.pt")["state"]
    assert (state["best_step"], state["worse"]) == (5, 1) and torch.load(tmp_path / "best.pt")["state"]["step"] == 5


def test_patience_counts_across_a_stop(text, tmp_path, monkeypatch, capsys):
    losses = iter([1.0, 2.0, 3.0, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: ({"loss": next(losses)}, None))
    assert not fit(tmp_path, text, "--max_iters=5", "--patience=2")  # evaluated at steps 0 and 5
    assert not fit(tmp_path, text, "--max_iters=15", "--patience=2", "--init_from=resume")
    assert "no better validation in 2 evaluations: stopped" in capsys.readouterr().out
    state = torch.load(tmp_path / "ckpt.pt")["state"]
    assert (state["step"], state["worse"], state["best_step"], next(losses)) == (10, 2, 0, 0.5)


@pytest.mark.parametrize("count", [1, 2, 3, 99])
def test_an_estimate_is_of_batches_spread_over_the_split(tmp_path, count):
    """A text that changes as it goes on: its first batches do not stand for it."""
    text = "".join(chr(97 + n // 60) * 60 for n in range(0, 1560, 60))
    data = Dataset(write_bytes(tmp_path / "data", val=text))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, vocab_size=256)).eval()
    with torch.no_grad():
        model.embedding.weight *= 20
    every = list(in_order(batches(data, "val", 4, 16)))
    assert len(every) == 25
    chosen = [every[round((n + 0.5) * 25 / count - 0.5)] for n in range(count)] if count < 25 else every
    found, first = evaluate(model, data, "val", 4, "cpu", "float32", count)[0]["loss"], mean_loss(model, every[:count])
    assert found == pytest.approx(mean_loss(model, chosen), rel=1e-6) and (count == 99 or abs(found - first) > 1e-3)


@pytest.mark.parametrize("texts", ["text", "reviews"])
def test_the_order_in_which_ranks_are_done_changes_no_bit(request, texts, monkeypatch):
    """Losses are added up in the order of the split, whichever rank looked at which batch."""
    data = Dataset(request.getfixturevalue(texts))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, vocab_size=256, n_class=len(data.classes)))
    alone = evaluate(model, data, "val", 2, "cpu", "float32")

    def dealt(found):  # as three ranks would hand them in
        return [{n: part for n, part in found.items() if n % 3 == rank} for rank in (2, 0, 1)]

    monkeypatch.setattr(evaluation.dist, "all_gather", dealt)
    shared = evaluate(model, data, "val", 2, "cpu", "float32")
    assert json.dumps(alone[0]) == json.dumps(shared[0])
    assert data.kind == "lm" or np.array_equal(alone[1], shared[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy_of_the_next_token(text, dtype, monkeypatch):
    """The share of targets that are the most likely token; those that the data leave out, and padding, do not count."""
    data = Dataset(text)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, vocab_size=256)).eval()
    stack = TextBatches.stack

    def masked(source, rows):
        x, y, lengths = stack(source, rows)
        y[:, ::3] = -1
        return x, y, lengths

    with torch.no_grad():
        model.embedding.weight[32].mul_(3).add_(0.05)  # a model that often expects a space
    for left_out in (False, True):
        if left_out:
            monkeypatch.setattr(TextBatches, "stack", masked)
        right, count = 0, 0
        for x, y, _ in in_order(batches(data, "val", 4, 16)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(x, y)[0]
            for scores, target in zip(logits.flatten(0, 1).tolist(), y.flatten().tolist()):
                if target >= 0:
                    right, count = right + (scores.index(max(scores)) == target), count + 1
        assert count == (312 if left_out else 499) and 10 < right < count - 10
        assert evaluate(model, data, "val", 4, "cpu", dtype)[0]["accuracy"] == right / count


def test_accuracy_by_length():
    """Quarters of the texts by length; texts of one length are not separated, whatever the order."""
    lengths = np.array([7, 3, 3, 90, 3, 8, 20, 3, 21, 9])  # 3 3 3 3 | 7 8 | 9 20 | 21 90: ends at texts 3, 5, 8, 10
    p = np.array([0.9, 0.2, 0.6, 0.6, 0.1, 0.7, 0.4, 0.3, 0.5, 0.8])
    labels = np.array([1, 0, 0, 0, 0, 1, 1, 1, 0, 1])
    expected = [[3, 3, 4, 0.5], [7, 7, 1, 1.0], [8, 20, 3, 2 / 3], [21, 90, 2, 0.5]]
    assert evaluation.accuracy_by_length(p, labels, lengths) == expected
    order = np.random.default_rng(0).permutation(10)
    assert evaluation.accuracy_by_length(p[order], labels[order], lengths[order]) == expected
    assert evaluation.accuracy_by_length([0.2, 0.3], [0, 1], np.array([5, 5])) == [[5, 5, 2, 0.5]]


def test_accuracy_by_length_is_of_the_whole_text(tmp_path, capsys):
    """Lengths are those of the texts, also beyond the block size; eval_only prints them; predictions hold them."""
    data = write_reviews(tmp_path / "data", **{split: [review(n) for n in range(16)] for split in ("train", "val")})
    assert not fit(tmp_path / "out", data, "--max_iters=2", "--eval_iters=0")
    lengths = sorted(len(review(n)[0].encode()) + 1 for n in range(16))
    records = log_of(tmp_path / "out", "val")
    groups = records[-1]["accuracy_by_length"]
    assert [row[0] for row in groups] == [lengths[0], *(min(x for x in lengths if x > row[1]) for row in groups[:-1])]
    assert groups[-1][1] == lengths[-1] > 16 and sum(row[2] for row in groups) == 16 and len(groups) == 4
    assert sum(row[2] * row[3] for row in groups) / 16 == pytest.approx(records[-1]["accuracy"])
    with np.load(tmp_path / "out" / "predictions-val.npz") as found:
        assert found["length"].tolist() == [len(review(n)[0].encode()) + 1 for n in range(16)]
    capsys.readouterr()
    assert not fit(tmp_path / "out", data, "--eval_only=True")
    (line,) = re.findall("^val: loss .*; accuracy by length in tokens: (.*)$", capsys.readouterr().out, re.M)
    assert line == ", ".join(f"{accuracy:.4f} ({a}-{b})" for a, b, _, accuracy in groups)


def test_the_last_scores_are_of_the_whole_split(folder, tmp_path):
    assert not fit(tmp_path, folder, "--max_iters=5", "--eval_test=True")
    last = [scores_of(record) for record in log_of(tmp_path) if record.pop("whole", False)]
    best = torch.load(tmp_path / "best.pt")["state"]["step"]
    assert last == [{"step": best, "split": split, **evaluate_again(tmp_path, folder, split)}
                    for split in ("val", "test")]


def test_predictions(reviews, tmp_path):
    """Of each text of a split, in the order of its file, what the best weights say."""
    assert not fit(tmp_path, reviews, "--max_iters=5", "--eval_test=True")
    (model, _), data = load(tmp_path / "best.pt"), Dataset(reviews)
    for split in ("val", "test"):
        tokens, offsets, labels = data.texts(split)
        texts = [torch.tensor(tokens[a:b][:16].astype(int))[None] for a, b in zip(offsets, offsets[1:])]
        with np.load(tmp_path / f"predictions-{split}.npz") as found, torch.no_grad():
            assert found["label"].tolist() == labels.tolist() and len(set(map(len, texts))) >= 1
            expected = [model(text)[0].softmax(-1)[0, 1].item() for text in texts]
            assert found["p"].tolist() == pytest.approx(expected, rel=1e-5) and len(set(expected)) > 3


def test_training_scores(folder, tmp_path, capsys):
    """eval_train adds the training split's scores to each validation; the rest of the run is as without it."""
    assert not fit(tmp_path / "plain", folder, "--max_iters=5")
    assert not fit(tmp_path / "both", folder, "--max_iters=5", "--eval_train=True", "--eval_iters=0")
    records = [r for r in log_of(tmp_path / "both", "val") if "whole" not in r]
    (model, _), data = load(tmp_path / "both" / "ckpt.pt"), Dataset(folder)
    with torch.no_grad():
        each = [model(x, y, lengths)[1].item() * (y != -1).sum().item()
                for x, y, lengths in in_order(batches(data, "train", 4, 16))]
        count = sum((y != -1).sum().item() for _, y, _ in in_order(batches(data, "train", 4, 16)))
    assert records[-1]["train_loss"] == pytest.approx(sum(each) / count, rel=1e-5)
    assert ("train_f1" in records[-1]) == (data.kind == "classify") and "train loss" in capsys.readouterr().out
    assert 0 <= records[-1]["train_accuracy"] <= 1
    one, other = (torch.load(tmp_path / name / "ckpt.pt")["model"] for name in ("plain", "both"))
    assert_same(one, other)


def test_work_is_counted(text, tmp_path):
    """Tokens read times what the model says that training on one takes; a stop and a start count nothing twice."""
    assert not fit(tmp_path, text, "--max_iters=3", "--log_interval=2")
    assert not fit(tmp_path, text, "--max_iters=7", "--log_interval=2", "--init_from=resume")
    last = log_of(tmp_path)[-1]
    model, _ = load(tmp_path / "best.pt")
    tokens = json.loads((tmp_path / "config.json").read_text())["settings"]
    tokens = 7 * tokens["batch_size"] * tokens["block_size"] * tokens["gradient_accumulation_steps"]
    assert last["whole"] and last["work"] == pytest.approx(tokens * model.estimate_flops(16))


def test_eval_only(folder, tmp_path, capsys, refused):
    assert "no checkpoint at" in refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={folder}",
                                         "--eval_only=True")
    assert not fit(tmp_path / "out", folder, "--max_iters=5")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    for line, splits in (((), ["val"]), (("--eval_test=True",), ["val", "test"])):
        assert not fit(tmp_path / "out", folder, "--eval_only=True", *line)
        said = re.findall(r"^(val|test): loss ([\d.]+) nats", capsys.readouterr().out, re.M)
        assert [split for split, _ in said] == splits
        for split, loss in said:
            assert float(loss) == pytest.approx(evaluate_again(tmp_path / "out", folder, split)["loss"].expected,
                                                abs=1e-4)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_the_test_split_is_opened_only_when_asked(folder, tmp_path, monkeypatch, refused):
    copy, opened = tmp_path / "data", []
    shutil.copytree(folder, copy)
    array = Dataset.array
    monkeypatch.setattr(Dataset, "array", lambda self, name, *more: (opened.append(name), array(self, name, *more))[1])
    for file in copy.glob("test.*"):
        file.unlink()
    assert not fit(tmp_path / "out", copy, "--max_iters=2")
    assert opened and not any(name.startswith("test") for name in opened)
    line = refused(train, f"--out_dir={tmp_path / 'other'}", f"--dataset={copy}", *SMALL, "--eval_test=True")
    assert re.search(r"test.*\.bin: expected [\d,]+ bytes, found 0", line) and not (tmp_path / "other").exists()


def test_no_test_split_is_said_before_the_training(tmp_path, refused):
    data = write_bytes(tmp_path / "data", train="abc" * 20, val="abc")
    line = refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={data}", *SMALL, "--eval_test=True")
    assert "has no split 'test'; it has train, val" in line and not (tmp_path / "out").exists()


def test_evaluation_does_not_touch_the_training(text, tmp_path):
    """How often and how long is evaluated changes no weight, with dropout, which draws from the random stream."""
    for n, line in enumerate((("--eval_interval=2", "--eval_iters=0"), ("--eval_interval=9",))):
        assert not fit(tmp_path / str(n), text, "--max_iters=9", "--dropout=0.2", *line)
    one, other = (torch.load(tmp_path / n / "ckpt.pt")["model"] for n in "01")
    assert_same(one, other)
