"""The training loop as its user runs it: exact resume, every way to stop, what it refuses, that it learns."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from core import checkpoint as checkpoint_file
from core import hardware, runs
from core.config import UserError, run_main
from core.dataset import Dataset, TextBatches, batches
from core.evaluation import scores
from core.inference import sample_next_token
from core.mechanisms import mechanisms
from helpers import ROOT, call, write_bytes
from model import load

SMALL = ("--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=4", "--warmup_iters=2",
         "--eval_interval=5", "--eval_iters=2", "--log_interval=1", "--device=cpu", "--dtype=float32")
SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
HARD = ("--dropout=0.2", "--gradient_accumulation_steps=2", "--max_iters=12", "--lr_decay_iters=12")  # to resume
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(params=["text", "reviews"])
def folder(request):
    """The data of a language model and of a classifier."""
    return request.getfixturevalue(request.param)


def fit(out, data, *arguments):
    """train.py's exit code."""
    return call(train, f"--out_dir={out}", f"--dataset={data}", *SMALL, *arguments)


def log_of(out, *splits):
    """The records of log.jsonl, each line checked; without what depends on the clock."""
    records = [json.loads(line, parse_constant=pytest.fail) for line in (out / "log.jsonl").read_text().splitlines()]
    for record in records:
        assert type(record["step"]) is int and record["split"] in ("train", "val", "test")
        for key in ("seconds", "tokens_per_second", "matmul_share"):
            assert (key in record) == (record["split"] == "train" or key == "seconds" and "whole" in record)
            record.pop(key, None)
    return [record for record in records if not splits or record["split"] in splits]


def assert_same(a, b):
    """Nested tensors and plain values, equal to the bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_runs(a, b):
    """Two runs that ended alike: weights, optimizer, random stream, best weights, and every line of the log."""
    for name in ("ckpt.pt", "best.pt"):
        one, other = (torch.load(out / name, weights_only=True) for out in (a, b))
        assert one.keys() == other.keys()
        for checkpoint in (one, other):
            checkpoint.pop("settings")  # out_dir, init_from
            checkpoint["state"].pop("seconds")
        assert_same(one, other)
    assert log_of(a) == log_of(b)


@pytest.fixture
def at_batch(monkeypatch):
    """A function: do something when training asks for its batch `number`; evaluation's batches do not count."""

    def arrange(number, action):
        def make(*arguments):
            source = batches(*arguments)
            if arguments[1] == "train":
                ask = source.batch
                source.batch = lambda n, *part: (n == number and action(), ask(n, *part))[1]
            return source

        monkeypatch.setattr(train, "batches", make)

    return arrange


def send(number):
    return lambda: os.kill(os.getpid(), number)


# ---- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_stopped_and_resumed_equals_unbroken(folder, tmp_path, at_batch, monkeypatch, capsys, number):
    assert not fit(tmp_path / "whole", folder, *HARD)
    at_batch(15, send(number))  # in the second half of step 7, between two evaluations
    assert fit(tmp_path / "cut", folder, *HARD) == 128 + number
    assert "stopped at step 8, saved; go on with --init_from=resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "cut" / "ckpt.pt")["state"]["step"] == 8
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "matmul_rate", lambda *machine: 1e9)
    assert not fit(tmp_path / "cut", folder, *HARD, "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_killed_and_resumed_equals_unbroken(text, tmp_path):
    """SIGKILL in the middle of step 8: a step that the log has and the checkpoint (of step 5) has not."""
    program = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import train, torch
from core import hardware
torch.set_num_threads(1)
hardware.matmul_rate = lambda *machine: 1e9
make = train.batches
def killing(*arguments):
    source = make(*arguments)
    ask = source.batch
    source.batch = lambda n, *part: os.kill(os.getpid(), 9) if n == 17 else ask(n, *part)
    return source
train.batches = killing
train.run_main(train.main)
"""
    line = [f"--out_dir={tmp_path / 'cut'}", f"--dataset={text}", *SMALL, *HARD]
    done = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert log_of(tmp_path / "cut", "train")[-1]["step"] == 7
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 8, "spl')  # as a crash of the machine leaves it
    assert not fit(tmp_path / "cut", text, *HARD, "--init_from=resume")
    assert not fit(tmp_path / "whole", text, *HARD)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_resume_with_more_steps(folder, tmp_path):
    """N steps, then N more, equal 2N: only the evaluation at the shorter run's end is extra."""
    assert not fit(tmp_path / "whole", folder, *HARD)
    assert not fit(tmp_path / "cut", folder, *HARD, "--max_iters=5")
    assert sum(record.get("whole", False) for record in log_of(tmp_path / "cut")) == 1
    assert not fit(tmp_path / "cut", folder, *HARD, "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_resume_keeps_the_precision(text, tmp_path, monkeypatch):
    """Rates are measured, and another moment may give others: what `auto` chose stays."""
    assert not fit(tmp_path / "out", text, "--max_iters=2", "--dtype=auto")
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, dtype: 1e9 if dtype == "float32" else 9e9)
    assert not fit(tmp_path / "new", text, "--max_iters=2", "--dtype=auto")
    assert not fit(tmp_path / "out", text, "--max_iters=4", "--dtype=auto", "--init_from=resume")
    assert [torch.load(tmp_path / name / "ckpt.pt")["dtype"] for name in ("new", "out")] == ["bfloat16", "float32"]


def test_resume_at_the_end_changes_nothing(text, tmp_path):
    assert not fit(tmp_path, text, "--max_iters=5")
    before, log = torch.load(tmp_path / "ckpt.pt"), log_of(tmp_path)
    assert not fit(tmp_path, text, "--max_iters=5", "--init_from=resume")
    assert_same(torch.load(tmp_path / "ckpt.pt")["model"], before["model"])
    assert log_of(tmp_path) == log


def test_resume_says_what_is_not_as_it_was(text, reviews, tmp_path, capsys):
    assert not fit(tmp_path / "out", text, "--max_iters=2")
    shutil.copytree(tmp_path / "out", tmp_path / "lighter")
    assert not fit(tmp_path / "lighter", text, "--max_iters=4", "--init_from=resume")
    capsys.readouterr()
    assert not fit(tmp_path / "out", text, "--max_iters=4", "--init_from=resume", "--block_size=8", "--weight_decay=0.5")
    said = capsys.readouterr().out
    assert "block_size stays 16, not 8" in said and "max_iters was 2, is now 4" in said and "resume: from step 2 of 4" in said
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt")
    assert checkpoint["settings"]["block_size"] == 16 and checkpoint["settings"]["weight_decay"] == 0.5
    lighter = torch.load(tmp_path / "lighter" / "ckpt.pt")["model"]["embedding.weight"]
    assert checkpoint["model"]["embedding.weight"].norm() < lighter.norm()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["block_size"] == 16


def test_resume_is_refused(text, toy, reviews, tmp_path, refused):
    def refusal(data, *arguments):
        return refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={data}", *SMALL, "--init_from=resume", *arguments)

    assert "no checkpoint at" in refusal(text) and not (tmp_path / "out").exists()
    assert not fit(tmp_path / "out", reviews, "--max_iters=1")
    assert "was trained on other data" in refusal(text) and "was trained on other data" in refusal(toy)
    assert "was trained on other data" in refusal(reviews, "--task=lm")
    (tmp_path / "out" / "ckpt.pt").write_bytes((tmp_path / "out" / "ckpt.pt").read_bytes()[:5000])
    assert "ckpt.pt is damaged or not a checkpoint" in refusal(reviews)


# ---- every way to stop -------------------------------------------------------------------------


def test_ctrl_c_in_an_evaluation(text, tmp_path, monkeypatch):
    """Is seen at its next batch, not at its end, and the evaluation is done again."""
    seen, read = [], TextBatches.read

    def interrupted(self, rows):
        if self.seed == 0:  # not of training's batches
            seen.append(rows)
            if len(seen) == 9:  # the third evaluation
                os.kill(os.getpid(), signal.SIGINT)
        return read(self, rows)

    assert not fit(tmp_path / "whole", text, "--max_iters=12", "--eval_iters=4")
    monkeypatch.setattr(TextBatches, "read", interrupted)
    assert fit(tmp_path / "cut", text, "--max_iters=12", "--eval_iters=4") == 130
    assert len(seen) <= 10 and torch.load(tmp_path / "cut" / "ckpt.pt")["state"]["step"] == 10
    monkeypatch.setattr(TextBatches, "read", read)
    assert not fit(tmp_path / "cut", text, "--max_iters=12", "--eval_iters=4", "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_in_the_last_evaluation(text, tmp_path, monkeypatch):
    """After the training, while whole splits are scored: nothing is lost, and resume does only this again."""
    assert not fit(tmp_path / "whole", text, "--max_iters=3")
    finish = train.finish
    monkeypatch.setattr(train, "finish", lambda *arguments: (os.kill(os.getpid(), signal.SIGINT), finish(*arguments)))
    with pytest.raises(SystemExit) as left:
        run_main(lambda: fit(tmp_path / "cut", text, "--max_iters=3"))
    assert left.value.code == 130
    monkeypatch.setattr(train, "finish", finish)
    assert not fit(tmp_path / "cut", text, "--max_iters=3", "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_in_the_last_save(text, tmp_path, monkeypatch):
    """Nothing looks at the signal before the training is over: it must not be lost, nor end in a traceback."""
    saved, save = [], checkpoint_file.save

    def interrupted(path, *what):
        saved.append(path.name)
        if len(saved) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        save(path, *what)

    monkeypatch.setattr(checkpoint_file, "save", interrupted)
    with pytest.raises(SystemExit) as left:
        run_main(lambda: fit(tmp_path, text, "--max_iters=3"))
    assert left.value.code == 130 and load(tmp_path / "ckpt.pt")[1]["state"]["step"] == 3


@pytest.mark.parametrize("break_at", ["half", "rename"])
def test_a_save_that_fails_leaves_what_was_there(text, tmp_path, monkeypatch, refused, break_at):
    write, rename, calls = torch.save, os.replace, []

    def full():
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")

    def half(checkpoint, file):
        write(checkpoint, file)
        if len(calls) >= 3:
            file.truncate(1000)
        full()

    def no_rename(a, b):
        if str(b).endswith(".pt"):
            full()
        rename(a, b)

    monkeypatch.setattr(*((torch, "save", half) if break_at == "half" else (os, "replace", no_rename)))
    line = refused(train, f"--out_dir={tmp_path}", f"--dataset={text}", *SMALL, "--max_iters=20")
    assert re.search(r"could not write .*(ckpt|best).pt: No space left on device; what was there before is unchanged", line)
    for name in ("ckpt.pt", "best.pt"):
        load(tmp_path / name)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("poison", ["learning rate", "weights", "gradient"])
def test_a_loss_that_is_not_finite(text, tmp_path, monkeypatch, at_batch, refused, poison):
    arguments = ["--max_iters=20"]
    if poison == "learning rate":
        arguments += ["--learning_rate=1e30", "--grad_clip=0", "--warmup_iters=0", "--norm=layernorm"]
    elif poison == "weights":
        made, new = [], train.new_model
        monkeypatch.setattr(train, "new_model", lambda config: made.append(new(config)) or made[-1])
        at_batch(7, lambda: made[0].embedding.weight.data.fill_(math.nan))
    else:
        made, new = [], train.new_model
        monkeypatch.setattr(train, "new_model", lambda config: made.append(new(config)) or made[-1])
        at_batch(7, lambda: made[0].embedding.weight.register_hook(lambda grad: grad * math.inf))
    line = refused(train, f"--out_dir={tmp_path}", f"--dataset={text}", *SMALL, *arguments)
    assert "the norm of the gradient is" in line if poison == "gradient" else "the training loss is" in line
    assert re.search(r" is (nan|inf) at step \d+: stopped; .* try a lower learning_rate", line)
    for name in ("ckpt.pt", "best.pt"):
        for tensor in load(tmp_path / name)[1]["model"].values():
            assert tensor.isfinite().all()
    log_of(tmp_path)  # holds no NaN, which is no JSON


def test_patience(text, tmp_path, monkeypatch, capsys):
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 1.0])  # better at steps 0, 5 and 15, then not at 20 and 25
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda model, data, split, count=0:
                        ({"loss": next(losses)}, None) if count else evaluate(model, data, split, count))
    assert not fit(tmp_path, text, "--max_iters=99", "--patience=2")
    state = torch.load(tmp_path / "ckpt.pt")["state"]
    assert (state["step"], state["best_step"], state["best"]) == (25, 15, 3.0)
    assert torch.load(tmp_path / "best.pt")["state"]["step"] == 15
    assert "no better validation in 2 evaluations: stopped" in capsys.readouterr().out
    assert scores_of(log_of(tmp_path)[-1]) == {"step": 15, "split": "val", "whole": True, **evaluate_again(tmp_path, text, "val")}


def scores_of(record):
    """A record without what it says of the mechanism."""
    return {key: value for key, value in record.items() if key not in ("stats", "work_per_token", "work")}


def evaluate_again(out, data, split):
    """What a plain loop over a whole split gives for best.pt."""
    model, _ = load(out / "best.pt")
    data, total, seen, p, labels = Dataset(data), 0.0, 0, [], []
    with torch.no_grad():
        for x, y, lengths in batches(data, split, 4, 16).in_order():
            logits, _ = model(x, y, lengths)
            flat = logits.flatten(0, -2), y.flatten()
            each = torch.nn.functional.cross_entropy(*flat, ignore_index=-1, reduction="sum")
            total, seen = total + each.item(), seen + (y != -1).sum().item()
            if data.kind == "classify":
                p.append(logits.softmax(-1)[:, 1])
                labels.append(y)
    if data.kind == "classify":
        assert seen == data.meta["splits"][split]["documents"]
        return approximately({"loss": total / seen, **scores(torch.cat(p), torch.cat(labels))})
    assert seen == data.meta["splits"][split]["tokens"] - 1
    return approximately({"loss": total / seen, "bits_per_byte": total / seen / math.log(2)})


def approximately(scores):
    return {key: pytest.approx(value, rel=1e-6) for key, value in scores.items()}


# ---- evaluation --------------------------------------------------------------------------------


def test_the_last_scores_are_of_the_whole_split(folder, tmp_path):
    assert not fit(tmp_path, folder, "--max_iters=5", "--eval_test=True")
    last = [scores_of(record) for record in log_of(tmp_path) if record.pop("whole", False)]
    best = torch.load(tmp_path / "best.pt")["state"]["step"]
    assert last == [{"step": best, "split": split, **evaluate_again(tmp_path, folder, split)} for split in ("val", "test")]


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
        each = [model(x, y, lengths)[1].item() * (y != -1).sum().item() for x, y, lengths in batches(data, "train", 4, 16).in_order()]
        count = sum((y != -1).sum().item() for _, y, _ in batches(data, "train", 4, 16).in_order())
    assert records[-1]["train_loss"] == pytest.approx(sum(each) / count, rel=1e-5)
    assert ("train_accuracy" in records[-1]) == (data.kind == "classify") and "train loss" in capsys.readouterr().out
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
    assert "no checkpoint at" in refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={folder}", "--eval_only=True")
    assert not fit(tmp_path / "out", folder, "--max_iters=5")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    for line, splits in (((), ["val"]), (("--eval_test=True",), ["val", "test"])):
        assert not fit(tmp_path / "out", folder, "--eval_only=True", *line)
        said = re.findall(r"^(val|test): loss ([\d.]+) nats", capsys.readouterr().out, re.M)
        assert [split for split, _ in said] == splits
        for split, loss in said:
            assert float(loss) == pytest.approx(evaluate_again(tmp_path / "out", folder, split)["loss"].expected, abs=1e-4)
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


# ---- the folder of a run -----------------------------------------------------------------------


def test_the_folder_of_a_run(folder, tmp_path):
    out = tmp_path / "not" / "yet" / "there"
    assert not fit(out, f"{folder}/", "--max_iters=6", "--log_interval=2")
    answers = {"predictions-val.npz"} if "reviews" in str(folder) else set()
    assert {file.name for file in out.iterdir()} == {"config.json", "log.jsonl", "ckpt.pt", "ckpt-previous.pt", "best.pt", "lock"} | answers
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["max_iters"] == 6 and config["source"] == Dataset(folder).meta["source"]
    assert config["device"] == "cpu" and config["dtype"] == "float32" and config["machine"]["torch"] == torch.__version__
    log = log_of(out)
    assert [(record["step"], record["split"]) for record in log if "whole" not in record] == \
        [(0, "val"), (0, "train"), (2, "train"), (4, "train"), (5, "val"), (6, "val")]
    extra = {"accuracy", "f1", "precision", "recall", "auc"} if "reviews" in str(folder) else {"bits_per_byte"}
    for record in log:
        assert math.isfinite(record["loss"])
        more = {"lr", "grad_norm"} if record["split"] == "train" else extra | {"stats", "work_per_token", "work"}
        assert record.keys() - {"whole"} == {"step", "split", "loss"} | more
    raw = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(record["tokens_per_second"] > 0 and record["seconds"] > 0 for record in raw if record["split"] == "train")


def test_an_earlier_run_is_not_overwritten(text, tmp_path, capsys):
    out = tmp_path / "out"
    for n in range(3):
        assert not fit(out, text, f"--max_iters={n + 1}")
    assert [torch.load(folder / "ckpt.pt")["state"]["step"] for folder in (tmp_path / "out.1", tmp_path / "out.2", out)] \
        == [1, 2, 3]
    assert "out.2" in capsys.readouterr().out


def test_a_refused_run_moves_nothing(text, tmp_path, refused, monkeypatch):
    assert not fit(tmp_path / "out", text, "--max_iters=1")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    for argument in ("--wandb_log=True", "--attention=denze", "--batch_size=0", "--dataset=nothing", "--n_head=3"):
        refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL, argument)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_steps(text, tmp_path):
    assert not fit(tmp_path, text, "--max_iters=0")
    assert [(record["step"], record["split"], "whole" in record) for record in log_of(tmp_path)] == \
        [(0, "val", False), (0, "val", True)]


def test_out_dir_that_cannot_be(text, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/out"):
        refused(train, f"--out_dir={out}", f"--dataset={text}", *SMALL, "--max_iters=1")
    assert (tmp_path / "file").read_text() == "mine"


def test_out_dir_here(text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert not fit(".", text, "--max_iters=1") and Path("ckpt.pt").exists()


def test_mend_log(tmp_path):
    def line(step, split="train", **more):
        return json.dumps({"step": step, "split": split, **more}) + "\n"

    path = tmp_path / "log.jsonl"
    kept = line(0, "val") + line(0) + line(4) + line(5, "val")
    path.write_bytes((kept + line(0, "val", whole=True) + line(5) + line(6, "val") + "[]\n{}\n\n1\n").encode() + b'{"st\xff')
    runs.mend_log(path, 5, 5)
    assert path.read_text() == kept
    runs.mend_log(tmp_path / "none.jsonl", 5, 5)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("argument, said", [
    ("--dataset=stdlb", "no dataset 'stdlb'"), ("--dtype=float31", "unknown dtype 'float31'; did you mean"),
    ("--device=gpu", "unknown device 'gpu'"), ("--attention=denze", "unknown attention 'denze'; did you mean dense?"),
    ("--attention=atr", "unknown attention 'atr'; did you mean atrt?"),
    ("--use_triangle_wave_masking=True", "'use_triangle_wave_masking'; it belongs to --attention=adaptive_attention_span"),
    ("--attention=sparse --span_reg=0", "'span_reg'; it belongs to --attention=adaptive_attention_span"),
    ("--attention=sparse --windo=3", "unknown key 'windo'; did you mean window?"),
    ("--attention=sparse --sparse_pattern=locl", "unknown sparse_pattern 'locl'; did you mean local?"),
    ("--attention=sparse --sparse_pattern=local,zzz", "unknown sparse_pattern 'zzz'; there are dense, fixed, local, log"),
    ("--attention=sparse --window=0", "window must be from 1 to 16,777,216, got 0"),
    ("--attention=atrt --atrt_scope=rows", "unknown atrt_scope 'rows'; did you mean row?"),
    ("--attention=atrt --atrt_scope=matrix", "atrt_scope"), ("--attention=atrt --atrt_task=zzz", "unknown atrt_task 'zzz'"),
    ("--use_adaptive_attention=1", "use_adaptive_attention expects bool (like False), got int 1"),
    ("--use_adaptive_attention=True --span_init=20", "span_init expects list (like []), got int 20"),
    ("--use_adaptive_attention=True --softness_span_mask=0", "softness_span_mask at least 1, both at most 16,777,216; got 0, 0"),
    ("--use_adaptive_attention=True --period_min_triangle_wave_masking=9", "period_m"),
    ("--pos=rop", "unknown pos 'rop'; did you mean rope?"), ("--norm=batchnorm", "unknown norm 'batchnorm'"),
    ("--pool=sum", "unknown pool 'sum'"), ("--kernel=fast", "unknown kernel 'fast'"),
    ("--init_from=gpt2", "unknown init_from 'gpt2'"), ("--lr_schedule=step", "unknown lr_schedule 'step'"),
    ("--task=classify", "holds lm data; task expects"), ("--batchsize=3", "did you mean batch_size?"),
    ("--n_embd=18", "n_embd must be a multiple of 4"), ("--n_embd=17", "n_embd must be a multiple of"),
    ("--batch_size=0", "batch_size must be at least 1, got 0"), ("--block_size=0", "block_size must be at least 1"),
    ("--n_layer=-1", "n_layer must be at least 1, got -1"), ("--n_layer=100000", "n_layer must be at most 10,000, got 100,000"),
    ("--n_head=0", "n_head must be at least 1"),
    ("--gradient_accumulation_steps=0", "gradient_accumulation_steps must be at least 1"),
    ("--eval_interval=0", "eval_interval must be at least 1"), ("--log_interval=0", "log_interval must be at least 1"),
    ("--max_iters=-1", "max_iters must be at least 0"), ("--eval_iters=-1", "eval_iters must be at least 0"),
    ("--patience=-1", "patience must be at least 0"), ("--warmup_iters=-1", "warmup_iters must be at least 0"),
    ("--seed=-1", "seed must be at least 0"), ("--grad_clip=-1", "grad_clip must be at least 0"),
    ("--learning_rate=-1", "learning_rate must be at least 0"), ("--weight_decay=-1", "weight_decay must be at least 0"),
    ("--beta2=1", "beta2 must be below 1"), ("--dropout=1", "dropout must be at least 0 and below 1"),
    ("no_such_config.py", "cannot read config file"),
])
def test_refused(text, tmp_path, refused, argument, said):
    assert said in refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL, *argument.split())
    assert not (tmp_path / "out").exists()


def test_refused_with_the_mechanisms_that_exist(text, tmp_path, refused):
    """Our own and those of files that a user has put beside them."""
    line = [f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL]
    assert f"unknown attention 'zzz'; there are {', '.join(sorted(mechanisms()))}" in refused(train, *line, "--attention=zzz")
    assert {"adaptive_attention_span", "atrt", "dense", "sparse"} <= set(mechanisms())
    owners = refused(train, *line, "--window=64").partition("unknown key 'window'; it belongs to --attention=")[2]
    assert "sparse" in owners.split(" or ")


def test_wandb_that_is_not_installed(text, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes `import wandb` fail
    line = refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL, "--wandb_log=True")
    assert "pip install wandb" in line


def test_wandb_gets_what_the_log_gets(text, tmp_path, monkeypatch):
    class Wandb:
        summary, logged = {}, []

        def init(self, **how):
            self.how = how

        def log(self, record, step):
            self.logged.append((step, record))

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert not fit(tmp_path / "out", text, "--max_iters=6", "--wandb_log=True", "--wandb_project=mine")
    assert wandb.how["project"] == "mine" and wandb.how["config"]["max_iters"] == 6
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps) and "train/loss" in wandb.logged[1][1] and "val/loss" in wandb.summary  # never back


# ---- what a step does --------------------------------------------------------------------------


def test_learning_rate(monkeypatch):
    for key, value in {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 4, "max_iters": 24, "lr_decay_iters": 0}.items():
        monkeypatch.setattr(train, key, value)
    assert [train.rate(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert train.rate(9) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert train.rate(14) == pytest.approx(0.55) and train.rate(24) == train.rate(99) == pytest.approx(0.1)
    monkeypatch.setattr(train, "lr_schedule", "linear")
    assert [train.rate(step) for step in (4, 9, 14, 24, 99)] == pytest.approx([1.0, 0.775, 0.55, 0.1, 0.1])
    monkeypatch.setattr(train, "lr_decay_iters", 14)
    assert [train.rate(step) for step in (9, 14, 20)] == pytest.approx([0.55, 0.1, 0.1])
    monkeypatch.setattr(train, "decay_lr", False)
    assert [train.rate(step) for step in (0, 4, 99)] == pytest.approx([0.2, 1.0, 1.0])
    monkeypatch.setattr(train, "warmup_iters", 0)
    assert train.rate(0) == 1.0


def test_gradients_are_not_cast(text, tmp_path, monkeypatch):
    """Autocast is for the forward pass alone: in the backward pass it would round the engine's float32 sums."""
    make, seen = train.new_model, []

    def watched(config):
        model = make(config)
        model.embedding.weight.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
        return model

    monkeypatch.setattr(train, "new_model", watched)
    assert not fit(tmp_path, text, "--max_iters=2", "--dtype=bfloat16")
    assert seen == [False, False]


def test_accumulated_gradients(text, tmp_path, monkeypatch):
    """Two halves of a batch give the step of the whole, within float32 rounding. (Two runs with 2 x 8 and 1 x 16 texts
    see different texts: batches are numbered through, and each draws its own. So the halves are cut here.)"""

    class Halves:
        def __init__(self, source):
            self.source = source

        def batch(self, number, *part):
            x, y, _ = self.source.batch(number // 2)
            half = slice(8 * (number % 2), 8 * (number % 2) + 8)
            return x[half], y[half], None

        def share(self, *part):
            return 1.0

    assert not fit(tmp_path / "whole", text, "--max_iters=5", "--batch_size=16")
    monkeypatch.setattr(train, "batches", lambda data, split, size, *more: batches(data, split, size, *more)
                        if split != "train" else Halves(batches(data, split, 16, *more)))
    assert not fit(tmp_path / "halves", text, "--max_iters=5", "--batch_size=8", "--gradient_accumulation_steps=2")
    whole, halves = log_of(tmp_path / "whole", "train"), log_of(tmp_path / "halves", "train")
    for one, other in zip(whole, halves):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_dropout_is_on_in_training_and_off_in_evaluation(text, tmp_path):
    for n, line in enumerate(("--dropout=0.0", "--dropout=0.5")):
        assert not fit(tmp_path / str(n), text, "--max_iters=1", line)
    (val, plain, *_), (same, dropped, *_) = log_of(tmp_path / "0"), log_of(tmp_path / "1")
    assert val == same and plain["loss"] != dropped["loss"]


def test_seeds(text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert not fit(tmp_path / name, text, "--max_iters=3", f"--seed={seed}")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") != log_of(tmp_path / "c")


@pytest.fixture
def asked(monkeypatch):
    """The models that torch.compile was asked for. It wraps them as ever, without the minutes of a C++ compiler."""
    asked, eager = [], torch._dynamo.optimize("eager")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda model: asked.append(model) or eager(model))
    torch._dynamo.reset()
    return asked


def test_compiled(toy, tmp_path, asked):
    """What torch.compile wraps leaves no trace in the checkpoint, and changes losses by rounding only."""
    small = ("--max_iters=3", "--n_layer=1", "--block_size=8")
    assert not fit(tmp_path / "compiled", toy, *small, "--compile=True")
    assert len(asked) == 1 and not fit(tmp_path / "plain", toy, *small)
    one, other = (torch.load(tmp_path / name / "ckpt.pt")["model"].keys() for name in ("compiled", "plain"))
    assert one == other
    for one, other in zip(log_of(tmp_path / "compiled"), log_of(tmp_path / "plain")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_compile_without_a_compiler(text, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    line = refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL, "--compile=True")
    assert "compile=True needs a C++ compiler on a CPU and found none" in line


# ---- every attention mechanism -----------------------------------------------------------------

MY_ATTENTION = '''"""Keys near by, each head at its own learned price of distance."""
import math

import torch

import attention

width = 3  # positions seen on each side
price = 0.0  # of a unit of slope, in the loss
start = [0.5]  # slopes, cycled over heads
name = "mine"
flat = False


class Attention(attention.Attention):
    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        start = self.options.start
        self.slope = torch.nn.Parameter(torch.tensor([start[h % len(start)] for h in range(self.n_head)]))

    def bias(self, h, i, j):
        slope = 0 * self.slope if self.options.flat else self.slope
        return torch.where((i - j).abs() <= self.options.width, -slope[h] * (i - j).abs(), -math.inf)

    def penalty(self):
        return self.options.price * self.slope.sum()

    def stats(self):
        return {**super().stats(), "slopes": self.slope.tolist(), "name": self.options.name}
'''
FILES = [file.stem for file in ROOT.glob("*.py") if file.stem != "attention" and "\nclass Attention(" in file.read_text("utf-8")]
OPTIONS = {  # more than the defaults, and small enough to leave something out of 16 tokens
    "adaptive_attention_span": [
        "--softness_span_mask=4 --span_init=[2,9] --span_reg=0.01",
        "--softness_span_mask=4 --span_init=[2,9] --span_reg=0.01 --use_triangle_wave_masking=True",
        "--softness_span_mask=4 --use_triangle_wave_masking=True --triangle_wave_harmonics=0 --snap_periods=True",
    ],
    "sparse": [f"--window=3 --stride=4 --sparse_pattern={pattern}" for pattern in ("local", "strided,fixed", "GD")],
    "atrt": ["", "--atrt_renormalize=False --atrt_task=summarization"],
    "my_attention": ["--price=0.1 --start=[0.1,1.0]"],
}
CASES = [f"--attention={name} {options}".strip() for name in ["dense", *sorted(FILES), "my_attention"]
         for options in OPTIONS.get(name, [""])]
ONLY_REVIEWS = ["--attention=sparse --sparse_pattern=local --window=3 --global_tokens=2",
                "--attention=atrt --atrt_scope=matrix"]


@pytest.fixture
def beside(tmp_path_factory, monkeypatch):
    """The folder of model.py as model.py sees it: the mechanisms of the repository, and my_attention.py."""
    folder = tmp_path_factory.mktemp("beside")
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "my_attention.py").write_text(MY_ATTENTION)
    monkeypatch.setattr("core.config.ROOT", folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])  # after the repository, whose own modules stay its own
    yield folder
    sys.modules.pop("my_attention", None)


@pytest.mark.parametrize("line, kind", [(line, kind) for line in CASES for kind in ("text", "reviews")]
                         + [(line, "reviews") for line in ONLY_REVIEWS], ids=str)
def test_every_mechanism(request, tmp_path, capsys, beside, line, kind):
    """By its name and options alone: it trains, resumes exactly, is evaluated as the reference is, and serves."""
    folder, line = request.getfixturevalue(kind), line.split()
    steps = ("--eval_interval=2", "--dropout=0.1", "--lr_decay_iters=4")
    assert not fit(tmp_path / "whole", folder, *line, *steps, "--max_iters=4")
    assert not fit(tmp_path / "cut", folder, *line, *steps, "--max_iters=2")
    half = torch.load(tmp_path / "cut" / "ckpt.pt")["model"]
    torch.manual_seed(0)  # the rest, too, the checkpoint knows
    assert not fit(tmp_path / "cut", folder, *steps, "--max_iters=4", "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    one, other = (json.loads((tmp_path / run / "config.json").read_text()) for run in ("whole", "cut"))
    assert one["options"] == other["options"] and one["settings"]["attention"] == other["settings"]["attention"]
    model, checkpoint = load(tmp_path / "whole" / "ckpt.pt")
    assert all(x.isfinite().all() for x in checkpoint["model"].values())
    still = {name.split(".")[-1] for name, x in checkpoint["model"].items() if torch.equal(x, half[name])}
    assert still == ({"period"} if "--snap_periods=True" in line else set())  # the loss reaches every other parameter
    *_, record, whole = log_of(tmp_path / "whole", "val")
    assert record["stats"] == [layer.attention.stats() for layer in model.layers] and record["step"] == 4
    assert all(0 < layer["kept_share"] <= 1 for layer in record["stats"])
    assert record["work_per_token"] == model.estimate_flops(16) and whole.keys() == record.keys() | {"whole"}
    model = sharpen(tmp_path / "whole")
    capsys.readouterr()
    said = []
    for kernel in ("auto", "reference"):
        assert not fit(tmp_path / "whole", folder, "--eval_only=True", f"--kernel={kernel}")
        said += re.findall(r"val: loss ([\d.]+)", capsys.readouterr().out)
    assert len(said) == 2 and float(said[0]) == pytest.approx(float(said[1]), abs=2e-4)
    assert_it_serves(tmp_path / "whole", model, capsys)


def sharpen(out):
    """Make the weights of a run large, and give its model: after four steps no token makes a difference to another."""
    for name in ("ckpt.pt", "best.pt"):
        checkpoint = torch.load(out / name)
        large = {name: 6 * x if x.dim() > 1 else x for name, x in checkpoint["model"].items()}
        checkpoint_file.save(out / name, {**checkpoint, "model": large})
    return load(out / "ckpt.pt")[0]


def assert_it_serves(out, model, capsys):
    """sample.py says what full passes through the reference kernel say: 60 drawn tokens, past the block; or labels."""
    texts = ["import os\n", "so good", "a film " * 9]
    common = (f"--out_dir={out}", "--checkpoint=ckpt.pt", "--device=cpu")
    reference, _ = load(out / "ckpt.pt", kernel="reference")
    if not model.config.causal:
        for text in texts:
            ids = torch.tensor([[0, *text.encode()]])[:, :16]
            p = torch.softmax(reference(ids)[0], -1)[0]
            for dtype, error in (("float32", 0.00051), ("bfloat16", 0.02)):
                assert not call(sample, *common, f"--start={text}", f"--dtype={dtype}")
                label, said = capsys.readouterr().out.split()[:2]
                assert float(said) == pytest.approx(p[["negative", "positive"].index(label)].item(), abs=error)
        return
    ids, random = torch.tensor([[*texts[0].encode()]]), torch.Generator().manual_seed(sample.seed)
    with torch.no_grad():
        for _ in range(60):
            ids = torch.cat([ids, sample_next_token(reference(ids)[0][:, -1], generator=random)[:, None]], 1)
    common += (f"--start={texts[0]}", "--temperature=1", "--top_k=0", "--max_new_tokens=60", "--num_samples=1")
    assert not call(sample, *common, "--dtype=float32")
    expected = bytes(ids[0].tolist()).decode("utf-8", "replace")
    assert capsys.readouterr().out == expected + "\n" + "-" * 40 + "\n"


def test_a_file_dropped_beside_the_scripts(text, tmp_path):
    """As its user does it: no line changed elsewhere, in a copy of the scripts where nothing is patched."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "core", tmp_path / "core")
    (tmp_path / "my_attention.py").write_text(MY_ATTENTION)
    (tmp_path / "mine.py").write_text("attention = 'my_attention'\nwidth = 5\nstart = [0.1, 1]\nname = ['a', 'b']\n")
    common = ("--out_dir=out", "--device=cpu", "--dtype=float32")
    training = (*SMALL, f"--dataset={text}", *common)
    lines = [("train.py", "mine.py", "--price=0.5", "--flat=True", "--max_iters=2", *training),
             ("train.py", "--max_iters=4", "--init_from=resume", "--attention=my_attention", "--width=4", *training),
             ("sample.py", "--start=the prompt", "--num_samples=1", "--max_new_tokens=20", *common),
             ("train.py", "mine.py", "--widht=3", *training)]
    program = f"""
import runpy, sys
for sys.argv in map(list, {lines!r}):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        print(sys.argv[0], "left with", left.code)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    first, resumed, sampled, refused = re.split(r"\.py left with ", done.stdout)[:-1]
    assert "my_attention attention by engine" in first and re.search("step 0: val .*, slopes 0.55 ", first), done.stderr
    assert "resume: from step 2 of 4" in resumed and "checkpoint: width was 5, is now 4" in resumed
    assert sampled.startswith("None\nthe prompt") and refused == "None\ntrain" and done.stdout.endswith(" 2\n")
    assert done.stderr.endswith("train.py: --widht: unknown key 'widht'; did you mean width?\n")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["options"] == {"width": 4, "price": 0.5, "start": [0.1, 1], "name": "a,b", "flat": True}
    slopes = [record["stats"][0]["slopes"] for record in log_of(tmp_path / "out", "val") if "whole" not in record]
    assert len(slopes) == 3 and slopes[0] == pytest.approx([0.1, 1.0])
    assert slopes[0][0] > slopes[1][0] > slopes[2][0]  # flat: no part of the loss but the penalty moves them, across the resume


def test_options_follow_the_line_where_the_weights_allow(text, tmp_path, capsys):
    """Periods are snapped on a checkpoint for fine-tuning and evaluation; a wave that was not trained is refused."""
    adaptive = "--attention=adaptive_attention_span"
    assert not fit(tmp_path / "out", text, adaptive, "--use_triangle_wave_masking=True", "--max_iters=1")
    for how in ("--eval_only=True", "--init_from=resume"):
        assert not fit(tmp_path / "out", text, adaptive, "--snap_periods=True", "--max_iters=2", how)
        assert "checkpoint: snap_periods was False, is now True" in capsys.readouterr().out
    options = json.loads((tmp_path / "out" / "config.json").read_text())["options"]
    assert options["snap_periods"] and options["use_triangle_wave_masking"]
    assert not fit(tmp_path / "plain", text, adaptive, "--max_iters=1")
    with pytest.raises(UserError, match="such an option is chosen before training"):
        fit(tmp_path / "plain", text, adaptive, "--use_triangle_wave_masking=True", "--init_from=resume")


def test_the_penalty_is_in_the_gradient_and_not_in_the_logged_loss(text, tmp_path, beside):
    """Whatever the number of forward passes of a step."""
    for price, passes in ((0.0, 1), (30.0, 1), (30.0, 3)):
        assert not fit(tmp_path / f"{price}-{passes}", text, "--attention=my_attention", f"--price={price}", "--max_iters=1",
                       f"--gradient_accumulation_steps={passes}", "--flat=True")
    free, priced, thrice = ([record for record in log_of(out, "train")][0] for out in sorted(tmp_path.iterdir()))
    assert free["loss"] == priced["loss"] and free["loss"] == pytest.approx(thrice["loss"], abs=0.1)
    expected = math.hypot(free["grad_norm"], 30 * math.sqrt(4))  # 2 layers of 2 heads
    assert priced["grad_norm"] == pytest.approx(expected, rel=1e-5) == pytest.approx(thrice["grad_norm"], rel=0.01)


def test_options_of_a_mechanism_in_a_config_file(text, tmp_path):
    (tmp_path / "x.py").write_text("attention = 'sparse'\nwindow = 3\nsparse_pattern = ['local', 'dense']\n")
    assert not fit(tmp_path / "file", text, tmp_path / "x.py", "--max_iters=2")
    assert not fit(tmp_path / "line", text, "--attention=sparse", "--window=3", "--sparse_pattern=local,dense", "--max_iters=2")
    assert_same_runs(tmp_path / "file", tmp_path / "line")
    local, dense = (layer["kept_share"] for layer in log_of(tmp_path / "file", "val")[0]["stats"])
    assert local == (16 * 3 - 3) / (16 * 17 / 2) and dense == 1.0


def test_what_an_evaluation_says_of_the_mechanism(text, tmp_path, monkeypatch, capsys):
    """The mean over layers and heads of every number, whatever its name; and as much work as its plan has now."""
    layer = train.new_model(train.GPTConfig(**SHAPE)).layers[0].attention
    health = [{"kept_share": 0.25, "reach_of_it": [10, 1000.5]}, {"kept_share": 0.2, "reach_of_it": [30.0, 3000], "kind": "x"}]
    assert runs.format_stats(health) == ", kept share 0.225, reach of it 1,010"
    assert runs.format_stats([{}, {"a": [], "b": "x", "c": -0.012345, "d": None}]) == ", c -0.0123"
    pairs, calls = [136, 120, 100, 50], []
    monkeypatch.setattr(type(layer), "stats", lambda self: dict(health[self.layer]))
    monkeypatch.setattr(train, "health", lambda model, health=train.health: calls.append(model) or health(model))
    monkeypatch.setattr(type(layer), "multiplied_pairs", lambda self, T: pairs[len(calls) - 1] if T == 16 and calls else 200)
    assert not fit(tmp_path, text, "--max_iters=7")
    records = log_of(tmp_path, "val")
    assert [record["stats"] for record in records] == [health] * 4
    assert [record["work_per_token"] for record in records] == \
        [6 * (12 * 16**2 * 2 + 16 * 256 + 2 * 16 * 2 * n / 16) for n in pairs]
    said = re.findall(r"^step (\d+): val .*, kept share 0.225, reach of it 1,010( \*)?$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _ in said] == [0, 5, 7]


def test_compiled_while_spans_change(text, tmp_path, asked):
    """The published command, smaller: accepted; and what it learns makes torch.compile start over no more often than
    dense attention does."""
    smaller = (f"--dataset={text}", *SMALL, "--eval_test=False", "--n_layer=1", "--learning_rate=0.3", "--warmup_iters=0")
    flags, graphs = ("--use_adaptive_attention=True", "--use_triangle_wave_masking=True", "--compile=True"), []
    for name, line in (("dense", ("--compile=True", "--max_iters=1")), ("periodic", (*flags, "--max_iters=12"))):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert not call(train, ROOT / "config" / "train_enwik8.py", *smaller, *line, f"--out_dir={tmp_path / name}")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(asked) == 2 and graphs[0] == graphs[1] > 0
    first, *_, last = [record["stats"][0] for record in log_of(tmp_path / "periodic", "val")]
    assert all(abs(a - b) > 0.2 for name in ("spans", "periods") for a, b in zip(first[name], last[name]))


# ---- that it learns ----------------------------------------------------------------------------


def test_it_learns_the_toy_sentences(toy, tmp_path, capsys):
    assert not fit(tmp_path, toy, "--pos=sinusoidal", "--block_size=8", "--batch_size=16", "--learning_rate=1e-2",
                   "--max_iters=150", "--eval_interval=50", "--log_interval=50")
    for start, follows in (("i love deep", "learning"), ("artificial intelligence", "is"), ("models learn", "patterns")):
        capsys.readouterr()
        call(sample, f"--out_dir={tmp_path}", f"--start={start}", "--temperature=0", "--max_new_tokens=1",
             "--num_samples=1", "--device=cpu", "--dtype=float32")
        assert capsys.readouterr().out.split("\n")[0] == f"{start} {follows}"


def test_it_learns_source_text(text, tmp_path):
    """Below 2.8 nats a byte: less than the frequencies of bytes in the judged text itself would give."""
    assert not fit(tmp_path, text, "--n_embd=32", "--block_size=32", "--batch_size=16", "--learning_rate=1e-2",
                   "--max_iters=200", "--eval_interval=100", "--log_interval=50")
    counts = torch.bincount(torch.tensor(Dataset(text).tokens("val"), dtype=torch.long))
    p = counts[counts > 0] / counts.sum()
    assert log_of(tmp_path)[-1]["loss"] < 2.8 < -(p * p.log()).sum()


def test_it_learns_labels(reviews, tmp_path):
    assert not fit(tmp_path, reviews, "--block_size=64", "--learning_rate=1e-2", "--max_iters=60", "--eval_interval=20",
                   "--eval_iters=0")
    assert log_of(tmp_path)[-1]["accuracy"] == 1.0
