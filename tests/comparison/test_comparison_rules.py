"""What a comparison says, piece by piece, of figures that are given: verdicts, hard texts, prompts, and what a run is
told."""

import json

import numpy as np
import pytest
import torch

import compare
from core import report
from core.results import continue_prompts, judge_hard
from core.tokenizer import Tokenizer

COST = {"parameters": 1, "seconds_per_step": 1.0, "work_per_step": 1.0}


@pytest.fixture(autouse=True)
def settings_as_they_were():
    before = dict(vars(compare))
    yield
    vars(compare).update(before)


def results(name, scores, **more):
    """A variant's results, a seed each: as `compare.train_one` gives them."""
    return [{"variant": name, "seed": n, "steps": 4, "work": 1.0, "kept_share": 1.0, "split": "val",
             "curve": [[0, 9.0], [4, s]],
             "scores": {"bits_per_byte": s}, **more} for n, s in enumerate(scores)]


def test_a_verdict_is_after_holm(monkeypatch):
    """Of three differences that alone would each be shown only the surest stays one."""
    given = {"b": (-0.1, 0.04), "c": (0.1, 0.001), "d": (0.1, 0.03)}
    monkeypatch.setattr(report, "difference_from", lambda first, runs, *_:
                        {"mean": given[runs[0]["variant"]][0], "low": -1, "high": 1, "p": given[runs[0]["variant"]][1]})
    runs = {name: results(name, (2.0, 2.1)) for name in "abcd"}
    rows = report.summarize(runs, dict.fromkeys(runs, COST), None, 100)["variants"]
    assert rows[0]["difference"] is None
    assert [row["difference"]["p_holm"] for row in rows[1:]] == pytest.approx([0.06, 0.003, 0.06])
    assert [row["difference"]["verdict"] for row in rows[1:]] == ["no difference shown", "worse", "no difference shown"]


def test_a_difference_is_seed_by_seed():
    """What the seeds have in common is taken off: the same gain at each shows, however far apart the seeds are."""
    shared = np.array([1.0, 5.0, 9.0, 2.0])
    runs = {"a": results("a", shared), "b": results("b", shared - np.array([0.10, 0.11, 0.09, 0.10]))}
    rows = report.summarize(runs, {"a": COST, "b": COST}, None, 100)["variants"]
    difference = rows[1]["difference"]
    assert difference["mean"] == pytest.approx(-0.1) and difference["verdict"] == "better"
    # the standard error of the four differences, 0.00816 / 2, times Student's 3.182
    assert difference["high"] - difference["mean"] == pytest.approx(3.1824 * 0.0081650 / 2, rel=1e-4)
    assert rows[0]["scores"]["bits_per_byte"]["mean"] == pytest.approx(4.25)


@pytest.mark.parametrize("scores, kind, score", [
    ({"loss": 1.0, "accuracy": 0.5, "bits_per_byte": 2.0}, "lm", "bits_per_byte"),
    ({"loss": 1.0, "accuracy": 0.5}, "lm", "loss"),  # words, which are not lossless
    ({"loss": 1.0, "accuracy": 0.5, "f1": 0.5, "auc": 0.5}, "classify", "accuracy")])
def test_what_is_judged(scores, kind, score):
    """A language model by its loss, not by the accuracy beside it, which earlier runs of a comparison lack."""
    new = [{**result, "scores": scores} for result in results("a", (2.0, 2.1))]
    summary = report.summarize({"a": new, "b": list(new)},
                               {"a": COST, "b": COST}, lambda result: np.array([True, False]), 100)
    assert (summary["kind"], summary["score"]) == (kind, score)
    assert summary["variants"][0]["scores"]["accuracy"]["mean"] == 0.5
    if kind == "lm":
        old = {**new[1], "scores": {name: x for name, x in scores.items() if name != "accuracy"}}
        summary = report.summarize({"a": [new[0], old], "b": [old, new[0]]}, {"a": COST, "b": COST}, None, 100)
        assert [set(row["scores"]) for row in summary["variants"]] == [set(scores) - {"accuracy"}] * 2


def test_recall_is_compared_by_accuracy(tmp_path):
    """Higher is better; no test of texts, which only classifiers have; the distances in ranges between powers of
    two."""
    runs = {}
    for name, shift in (("a", 0.0), ("b", -0.2)):
        runs[name] = results(name, (2.0, 2.1, 2.2))
        for n, run in enumerate(runs[name]):
            near = 0.9 + n / 100
            run |= {"scores": {"accuracy": near + shift / 2, "loss": 1.0},
                    "accuracy_by_distance": [[1, near], [2, near], [3, near], [6, near + 2 * shift], [7, near]]}
    compared = report.summarize(runs, dict.fromkeys(runs, COST), None, 100)
    assert (compared["kind"], compared["score"]) == ("lm", "accuracy")
    a, b = compared["variants"]
    assert a["accuracy_by_distance"] == [[d, pytest.approx(0.91)] for d in (1, 2, 3, 6, 7)]
    assert b["accuracy_by_distance"][3] == [6, pytest.approx(0.51)]
    assert b["difference"]["verdict"] == "worse" and b["difference"]["mean"] == pytest.approx(-0.1)
    for row in (a, b):
        row["block_size"] = 64
    machine = {"gpu": None, "processor": "A", "threads": 2, "torch": "2"}
    lines = report.table({**compared, "title": "x", "seeds": [1, 2, 3], "budget": "steps", "amount": 4,
                          "dataset": "recall",
                          "machine": machine, "dtype": "float32", "command": "python compare.py"})
    assert "| right (%) at distance | 1-1 | 2-3 | 4-7 |" in lines and "| b | 91.0 | 91.0 | 71.0 |" in lines
    assert "McNemar" not in lines and "-10.0 [-10.0, -10.0]" in lines


def test_hard_texts_that_are_told_right(tmp_path, monkeypatch):
    rows = [("so good", 1, "plain"), ("so bad", 0, "plain"), ("not good", 0, "negation"),
            ("not so good", 0, "negation"),
            ("not bad", 1, "negation"), ("never bad, good", 1, "negation")]
    (tmp_path / "hard").write_text("".join(json.dumps(dict(zip(("text", "label", "kind"), row))) + "\n"
                                           for row in rows))
    monkeypatch.setattr("core.results.predict", lambda model, tokenizer, texts, *_:
                        torch.tensor([0.9 if "good" in text else 0.2 for text in texts]))
    shares = judge_hard(None, None, tmp_path / "hard", "cpu", "float32")
    assert shares == {"plain": 1.0, "negation": 0.25}


def test_the_likeliest_token_after_a_prompt(monkeypatch):
    tokenizer = Tokenizer({"tokenizer": "chars", "vocab_size": 3, "mark": None, "vocab": ["a", "b", "c"]})
    p = {"ab": [0.2, 0.5, 0.3], "c": [0.7, 0.2, 0.1]}

    def model(idx):
        return torch.tensor(p[tokenizer.decode(idx[0].tolist())]).log()[None, None], None

    likeliest = continue_prompts(model, tokenizer, list(p), "cpu")
    assert likeliest == {"ab": ["b", pytest.approx(0.5)], "c": ["a", pytest.approx(0.7)]}


def test_what_a_run_is_told(text, tmp_path, monkeypatch):
    for key, value in {"out_dir": str(tmp_path), "base": [f"--dataset={text}"], "warmup": 0.1,
                       "evaluations": 4}.items():
        monkeypatch.setattr(compare, key, value)
    folder, _, settings = compare.plan(compare.parse("Local, 3: --attention=sparse --window=3"), 7, 60)
    assert folder == tmp_path / "local-3-7"
    expected = {"seed": 7, "max_iters": 60, "warmup_iters": 6, "eval_interval": 15, "attention": "sparse", "window": 3,
                "out_dir": str(folder)}
    assert expected.items() <= settings.items()


def test_answers_are_of_the_test_split_where_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "out_dir", str(tmp_path))
    (tmp_path / "dense-1").mkdir()
    np.savez(tmp_path / "dense-1" / "predictions-val.npz", p=np.array([0.9, 0.9, 0.2]), label=np.array([1, 0, 1]))
    assert compare.right_answers({"variant": "dense", "seed": 1}).tolist() == [True, False, False]
    np.savez(tmp_path / "dense-1" / "predictions-test.npz", p=np.array([0.4, 0.51, 0.1, 0.8]),
             label=np.array([0, 1, 1, 0]))
    assert compare.right_answers({"variant": "dense", "seed": 1}).tolist() == [True, True, False, False]
