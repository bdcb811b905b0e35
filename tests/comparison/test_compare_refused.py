"""What compare.py refuses before any run, and what it says of the context."""

import json

import pytest
from test_compare import settings, timed  # noqa: F401

import compare
from helpers import call, write_bytes, write_reviews

pytestmark = pytest.mark.usefixtures("timed")
SET_BY_COMPARE = [("seed=3", "seeds"), ("max_iters=9", "amount"), ("warmup_iters=3", "warmup"),
                  ("eval_interval=2", "evaluations"),
                  ("out_dir=elsewhere", "out_dir"), ("init_from=resume", "goes on"), ("eval_only=True", "trains")]


@pytest.fixture
def never_trained(monkeypatch):
    monkeypatch.setattr(compare, "run_training", lambda arguments: pytest.fail("a run was begun"))


@pytest.fixture
def told(refused, never_trained, tmp_path):
    """The sentence that a comparison is refused with, before anything is made."""

    def check(data, *variants, **change):
        line = refused(compare, *settings(tmp_path / "out", data, *variants, **change))
        assert not (tmp_path / "out").exists()
        return line

    return check


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    return write_bytes(tmp_path_factory.mktemp("data") / "other", train="other " * 500, val="words " * 80,
                       test="here " * 80)


def test_other_data(told, text, reviews, other_text):
    for change in (f"--dataset={other_text}", f"--dataset={reviews} --task=lm"):
        line = told(text, "a:", f"b: {change}")
        assert "variants must share their data" in line and "'b'" in line and "base" in line
    assert "classify" in told(text, "a:", f"b: --dataset={reviews}")
    assert "task" in told(reviews, "a:", "b: --task=lm") or "kind" in told(reviews, "a:", "b: --task=lm")


@pytest.mark.parametrize("change", ["eval_test=True", "eval_train=True", "dtype=bfloat16", "device=cuda"])
def test_other_scores(told, text, change):
    key, value = change.split("=")
    line = told(text, "a:", f"b: --{change}")
    assert f"variants must have the same {key}" in line and value in line


def test_the_same_data_by_another_name(text, tmp_path, monkeypatch):
    """A link to the data, or a task that is the data's own, is no other data."""
    (tmp_path / "link").symlink_to(text)
    monkeypatch.setattr(compare, "run_training", lambda arguments: pytest.fail("begun"))
    with pytest.raises(pytest.fail.Exception, match="begun"):
        call(compare, *settings(tmp_path / "out", text, "a:", f"b: --dataset={tmp_path / 'link'} --task=lm"))


@pytest.mark.parametrize("setting, instead", SET_BY_COMPARE)
def test_settings_of_compare(told, text, setting, instead):
    for change in ({"variants": ["a:", f"b: --{setting}"]}, {"base": [f"--dataset={text}", f"--{setting}"]}):
        line = told(text, **change)
        assert f"--{setting.split('=')[0]}" in line and instead in line


def test_a_recipe_keeps_its_own_length(text, tmp_path, monkeypatch):
    """A config file of train.py in base is a whole recipe: the comparison replaces its length, seed and folder."""
    (tmp_path / "x.py").write_text("max_iters = 3000\nseed = 5\nout_dir = 'elsewhere'\nlearning_rate = 0.5\n")
    monkeypatch.setattr(compare, "base", [str(tmp_path / "x.py")])
    variant = compare.parse("a:")
    assert compare.plan(variant, 1, 4)[2]["max_iters"] == 4 and variant.settings["learning_rate"] == 0.5


@pytest.mark.parametrize("change, said", [
    ({"prompts": [5]}, "prompts: expected texts"), ({"prompts": [""]}, "prompts: expected"),
    ({"base": [5]}, "base: expected"),
    ({"variants": ["a:", 5]}, "variants: expected texts"),
    ({"variants": ["a:", "b: --attention='sparse"]}, "No closing quotation"),
    ({"amount": "1e400"}, "amount expects float"), ({"amount": 1e300}, "steps"),
    ({"seeds": [1, 2**63]}, "seeds: expected"),
    ({"variants": ["a:", "b: --help"]}, "--help"), ({"base": ["-h"]}, "-h"), ({"results": "/"}, "results: expected"),
    ({"hard": "no.jsonl"}, "hard"), ({"variants": ["a:", "b: --batch_size=0"]}, "batch_size must be at least 1"),
    ({"variants": ["a:", "b: --n_head=3"]}, "n_embd must be a multiple"),
])
def test_values(told, refused, text, tmp_path, never_trained, change, said):
    if change.get("amount") == 1e300 or "--n_head=3" in str(change):  # told when the variants' models are built
        assert said in refused(compare, *settings(tmp_path / "out", text, **change))
    else:
        assert said in told(text, **change)


@pytest.mark.parametrize("prompt, pos, said",
                         [("zebra", "rope", "not in the vocabulary"), ("i love " * 9, "learned", "16 positions")])
def test_prompts(told, toy, prompt, pos, said):
    """They are read with the tokenizer of the data."""
    line = told(toy, f"a: --pos={pos}", f"b: --attention=sparse --pos={pos}", prompts=["i love", prompt])
    assert said in line and line.startswith("compare.py: ")


@pytest.mark.parametrize("rows, said", [
    ("", "holds no reviews"), ("{", "line 1"), ('{"text": "good", "label": 3, "kind": "plain"}', "line 1"),
    ('{"text": "", "label": 1, "kind": "plain"}', "an empty text"), ('{"text": "good", "kind": "plain"}', "label"),
])
def test_hard(told, reviews, tmp_path, rows, said):
    (tmp_path / "hard.jsonl").write_text(rows)
    assert said in told(reviews, hard=str(tmp_path / "hard.jsonl"))


def test_questions_of_the_other_kind(told, text, reviews, tmp_path):
    (tmp_path / "hard.jsonl").write_text('{"text": "good", "label": 1, "kind": "plain"}')
    assert "hard is for classifiers" in told(text, hard=str(tmp_path / "hard.jsonl"))
    assert "prompts are for language models" in told(reviews, prompts=["good"])


def test_the_context_is_told(text, tmp_path):
    """Another block_size is a fair variant, and part of its score."""
    call(compare, *settings(tmp_path, text, "short:", "long: --block_size=24", amount=2))
    rows = json.loads((tmp_path / "comparison.json").read_text())["variants"]
    assert [row["block_size"] for row in rows] == [16, 24]
    table = (tmp_path / "comparison.md").read_text()
    assert "| context |" in table and "contexts of different lengths" in table
    call(compare, *settings(tmp_path / "same", text, amount=2))
    same = (tmp_path / "same" / "comparison.md").read_text()
    assert "| context |" not in same and "a context of 16 tokens" in same


def test_results_that_cannot_be_written(refused, never_trained, text, tmp_path):
    """Are told before the runs, not after."""
    (tmp_path / "file").write_text("")
    assert "file" in refused(compare, *settings(tmp_path / "out", text, results=tmp_path / "file" / "table"))


def test_data_that_is_too_small(told, tmp_path):
    few = write_reviews(tmp_path / "few", train=[("a film", 1)] * 3, val=[], test=[])
    assert "val" in told(few)
