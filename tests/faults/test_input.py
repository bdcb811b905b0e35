"""Whatever a user can give, on the command line or in a file, ends in a result or in one sentence and exit code 2."""

import json
import sys

import pytest
from fault_injection import several
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_sample import BYTES, CHARS, MARKED, REVIEWS, write_checkpoint

import plot
import sample
import train
from core import heat, readers, runs
from core.config import UserError, plain_values, run_main
from core.dataset import Dataset, batches
from core.mechanisms import mechanisms
from core.tokenizer import UNKNOWN
from helpers import call, in_order
from model import options_of

pytestmark = pytest.mark.usefixtures("quick")
BASE = ("--max_iters=0", "--block_size=8", "--n_layer=1", "--n_head=2", "--n_embd=8", "--batch_size=2",
        "--eval_iters=1", "--device=cpu", "--dtype=float32")


def tried(few, many):
    """How often; the same cases each time, whatever is in hypothesis' memory."""
    return settings(max_examples=several(few, many), deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture
def fair(monkeypatch, capsys):
    """A function of a script and its arguments: it must end well, or with one line on stderr and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def check(module, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_main(lambda: call(module, *arguments))
        line = capsys.readouterr().err
        assert left.value.code in (None, 0, 2), line
        if left.value.code == 2:
            assert line.startswith("script.py: ") and line.count("\n") == 1 and len(line) < 1000, line
        return left.value.code

    return check


# ---- the command line ----------------------------------------------------------------------------

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 10**6, 10**12, 10**30, -(10**30)])
FLOATS = st.sampled_from(["nan", "inf", "1e999", "-1e999", "1e-300", "0", "-0.0", "0.5", "1e30", "2"])
ANY = st.characters(blacklist_characters="\0")  # which no argument of a process can hold
VALUES = st.one_of(NUMBERS.map(str), FLOATS, st.booleans().map(str), st.text(ANY, max_size=8),
                   st.lists(st.integers(-2, 5), max_size=3).map(str))
SAFE = {"max_iters", "eval_only", "compile", "out_dir", "wandb_log"}  # of themselves these only cost time


@st.composite
def arguments_of_train(draw):
    attention = draw(st.sampled_from(mechanisms()))
    keys = [key for key in plain_values(vars(train)) if key not in SAFE] + list(options_of("gpt", attention))
    given = [f"--{draw(st.sampled_from(keys))}={draw(VALUES)}" for _ in range(draw(st.integers(1, 2)))]
    return [f"--attention={attention}", *given]


def test_train(fair, text, reviews, tmp_path):
    codes = []

    @tried(10, 150)
    @given(arguments_of_train(), st.booleans())
    @example(["--n_embd=1000000"], False)
    @example(["--n_layer=1000000000000"], False)
    @example(["--block_size=1000000000"], False)
    @example(["--batch_size=1000000000000"], False)
    @example(["--seed=" + "9" * 30], False)
    @example(["--learning_rate=1e999", "--max_iters=2"], False)
    @example(["--gradient_accumulation_steps=1000000000", "--max_iters=1"], False)
    @example(["--dropout=0.999999999999", "--max_iters=1"], False)
    @example(["--out_dir=a\nb\0c"], False)
    def check(arguments, classify):
        folder = reviews if classify else text
        codes.append(fair(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={folder}", *BASE, *arguments))

    check()
    assert 2 in codes


@tried(30, 500)
@given(st.text(ANY, max_size=300))
def test_out_dir_and_dataset(name):
    for check in (lambda: Dataset(name), lambda: sample.load(sample.Path(name) / "no.pt")):
        with pytest.raises((UserError, OSError)):
            check()


# ---- prompts and reviews -------------------------------------------------------------------------

WORDS = {"tokenizer": "words", "vocab_size": 4, "mark": 0, "vocab": ["<s>", UNKNOWN, "a", "film"]}


def test_prompts(fair, tmp_path):
    outs = [write_checkpoint(tmp_path / str(n), meta) for n, meta in enumerate((BYTES, MARKED, CHARS, WORDS, REVIEWS))]

    @tried(10, 150)
    @given(st.sampled_from(outs), st.text(max_size=60) | st.binary(max_size=60), st.booleans())
    @example(outs[0], "\udcff\ud800", False)
    @example(outs[4], b"\xff\n\n\0", True)
    @example(outs[4], "<br />" * 20, True)
    def check(out, prompt, file):
        if file or isinstance(prompt, bytes) or prompt == "-":
            content = prompt if isinstance(prompt, bytes) else prompt.encode("utf-8", "surrogatepass")
            (tmp_path / "prompt").write_bytes(content)
            prompt = f"FILE:{tmp_path / 'prompt'}"
        fair(sample, f"--out_dir={out}", f"--start={prompt}", "--max_new_tokens=2", "--num_samples=1", "--device=cpu",
             "--dtype=float32")

    check()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
                    max_leaves=6)
REVIEW = st.fixed_dictionaries(
    {"text": st.text(max_size=40) | JSON},
    optional={"label": st.sampled_from([0, 1, "positive"]) | JSON, "kind": st.text(max_size=5) | JSON})


def test_review_files(fair, tmp_path):
    pytest.importorskip("matplotlib")
    out, file = write_checkpoint(tmp_path / "out", REVIEWS), tmp_path / "reviews.jsonl"

    @tried(100, 2000)
    @given(st.binary(max_size=80) | st.lists(REVIEW.map(json.dumps) | st.text(max_size=20), max_size=4).map("\n".join))
    @example("[" * 3000)
    def read(content):
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        try:
            heat.read_reviews(file, ["negative", "positive"])
        except UserError as error:
            assert "\n" not in str(error)

    @tried(2, 15)
    @given(st.lists(st.builds(lambda text, label: {"text": text, "label": label}, st.text(min_size=1, max_size=60),
                              st.sampled_from([0, 1, None])), min_size=1, max_size=3))
    @example([{"text": "\ud800 $x$ \x07 \u202e \U0001f600 " + "a" * 200, "label": 1}])
    def draw(rows):
        file.write_text("\n".join(map(json.dumps, rows)))
        fair(plot, out, f"--reviews={file}", f"--out={tmp_path}")

    read()
    draw()


# ---- files of data and of runs -------------------------------------------------------------------


def changed(draw, value):
    """A JSON value with something in it replaced."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        n = draw(st.integers(0, len(value) - 1))
        return [*value[:n], changed(draw, value[n]), *value[n + 1 :]]
    return draw(JSON | st.sampled_from(["O", "V0", "uint64", "bytes", "chars", 10**30, -1, 1e400, 2**63]))


def test_meta(text, reviews, tmp_path):
    """Whatever stands in a meta.json, reading the data gives batches or one sentence."""
    folders = {}
    for name, folder in (("text", text), ("reviews", reviews)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for file in folder.iterdir():
            (folders[name] / file.name).write_bytes(file.read_bytes())
    metas = {name: json.loads((folder / "meta.json").read_text()) for name, folder in folders.items()}

    @tried(100, 1500)
    @given(st.sampled_from(sorted(metas)), st.data())
    def check(name, data):
        whole = json.dumps(changed(data.draw, metas[name]))
        spoilt = st.sampled_from(["[" * 3000, whole[: len(whole) // 2], ""])
        (folders[name] / "meta.json").write_text(data.draw(spoilt) if data.draw(st.integers(0, 9)) == 0 else whole)
        try:
            read = Dataset(folders[name])
            for split in ("train", "val", "test"):
                source = batches(read, split, 2, 8)
                source.batch(0)
                next(iter(in_order(source, 1)))
                read.kind == "lm" and read.bytes_per_token(split)
            read.check_files()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000

    check()


LAYER = st.fixed_dictionaries({}, optional={
    "kept_share": st.floats(0, 1) | JSON, "spans": st.lists(st.floats(0, 9), max_size=3) | JSON, "periods": JSON})
RECORD = st.fixed_dictionaries(
    {"step": st.integers(0, 50) | JSON, "split": st.sampled_from(["train", "val", "test"]) | JSON,
     "loss": st.floats(0, 9) | JSON},
    optional={"accuracy": st.floats(0, 1) | JSON, "bits_per_byte": JSON, "whole": st.just(True) | JSON,
              "train_loss": JSON, "stats": st.lists(LAYER, max_size=3) | JSON})


def test_log(fair, tmp_path):
    """Whatever stands in a log.jsonl, plots are drawn of what is right in it, and a resumed run goes on."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "log.jsonl"

    def write(lines):
        path.write_text("\n".join(lines), "utf-8", "replace")

    lines = st.lists(RECORD.map(json.dumps) | st.text(max_size=20) | JSON.map(json.dumps), max_size=6)

    @tried(100, 2000)
    @given(lines)
    @example(["[" * 3000])
    @example([json.dumps({"step": 10**400, "split": "val", "loss": 1}), '{"step": 1e999, "split": "val", "loss": NaN}'])
    def read(lines):
        write(lines)
        runs.mend_log(path, 10, 10)
        write(lines)
        try:
            readers.read_log(path)
        except UserError as error:
            assert "holds no records yet" in str(error)

    @tried(3, 30)
    @given(lines)
    @example([json.dumps({"step": n, "split": "val", "loss": 1, "stats": [{"spans": [1] * n, "kept_share": 0.5}] * n})
              for n in range(4)])
    def draw(lines):
        write([json.dumps({"step": 1, "split": "val", "loss": 2.0}), *lines])
        assert fair(plot, tmp_path) in (None, 0)

    read()
    draw()
