"""What compare.py leaves alone: files that are not its own, and runs that are finished."""

import json
import os
import random
import signal
import time

import pytest
from fault_injection import count, end, program
from test_compare import settings, timed  # noqa: F401

import compare
from helpers import call

pytestmark = pytest.mark.usefixtures("timed")


@pytest.fixture
def trained(monkeypatch):
    """The arguments of each run of train.py."""
    calls, run_training = [], compare.run_training
    monkeypatch.setattr(compare, "run_training", lambda arguments: calls.append(arguments) or run_training(arguments))
    return calls


def files_of(folder):
    """{content: how many files below `folder` have it}"""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {content: contents.count(content) for content in contents}


def lost(before, folder):
    """Bytes of the files `before` that are no longer anywhere below `folder`, under any name."""
    now = files_of(folder)
    return sum(len(content) * max(0, n - now.get(content, 0)) for content, n in before.items())


def test_folders_of_strangers(text, tmp_path, trained, refused):
    """Folders that are there already, with files that no run writes: refused before any run, and nothing is touched. A
    run's files are moved aside."""
    for name in ("dense-1/thesis.txt", "local-1/config.json", "local-1/log.jsonl", "dense-2/chapters/one.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("three years of work: " + name)
    before = files_of(tmp_path)
    for name in ("dense-1/thesis.txt", "dense-2/chapters"):
        said = refused(compare, *settings(tmp_path, text, amount=2))
        assert f"{name.split('/')[0]} holds '{name.split('/')[1]}', which is no file of a run" in said
        assert lost(before, tmp_path) == 0 and trained == []
        (tmp_path / name).rename(tmp_path / name.replace("/", " "))
    call(compare, *settings(tmp_path, text, amount=2))
    count("compare.py: folders hold other files", injected=3, refused=2, lost=lost(before, tmp_path))
    assert lost(before, tmp_path) == 0 and (tmp_path / "comparison.json").exists()


DAMAGE = [None, "", "{}", "no scores", "scores of text", "no curve", "[" * 3000, "NaN"]


def test_finished_runs(text, tmp_path, trained):
    """If its result.json is missing or damaged, a finished run is read again and not trained again."""
    arguments = settings(tmp_path, text, amount=2, prompts=["import "])
    call(compare, *arguments)
    folder, summary = tmp_path / "local-2", json.loads((tmp_path / "comparison.json").read_text())
    path, before = folder / "result.json", files_of(folder)
    whole = json.loads(path.read_text())
    trained.clear()
    for how in DAMAGE:
        damage(path, whole, how)
        call(compare, *arguments)
        missing = lost(before, folder)
        count("compare.py: the result of a finished run is missing or damaged", resumed=1, lost=missing)
        assert trained == [] and missing == 0 and json.loads(path.read_text()) == whole
        assert json.loads((tmp_path / "comparison.json").read_text())["variants"] == summary["variants"]


def damage(path, whole, how):
    if how is None:
        path.unlink()
    elif how == "no scores":
        path.write_text(json.dumps({**whole, "scores": {}}))
    elif how == "scores of text":
        path.write_text(json.dumps({**whole, "scores": {"loss": "low", "bits_per_byte": None}}))
    elif how == "no curve":
        path.write_text(json.dumps({**whole, "curve": [[0]]}))
    elif how == "NaN":
        path.write_text(json.dumps({**whole, "seconds": float("nan")}))
    else:
        path.write_text(how)


def test_classifiers(reviews, tmp_path, trained):
    """Their predictions belong to the result: a run that lacks them is trained again, and moved aside before."""
    arguments = settings(tmp_path, reviews, amount=2)
    call(compare, *arguments)
    (tmp_path / "dense-1" / "result.json").unlink()
    trained.clear()
    call(compare, *arguments)
    assert trained == []
    (tmp_path / "dense-1" / "predictions-val.npz").unlink()
    before = files_of(tmp_path / "dense-1")
    call(compare, *arguments)
    assert len(trained) == 1 and lost(before, tmp_path) == 0


def test_another_question_is_read_from_the_weights(text, tmp_path, trained):
    """Prompts that are asked for later need no training."""
    call(compare, *settings(tmp_path, text, amount=2))
    trained.clear()
    call(compare, *settings(tmp_path, text, amount=2, prompts=["import "]))
    assert trained == [] and "import " in json.loads((tmp_path / "comparison.json").read_text())["variants"][0]["next"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_any_moment(text, tmp_path, how):
    """Stopped again and again and started again: the same table, to the last character."""
    def arguments(folder):
        return settings(folder, text, amount=100, evaluations=5, results=tmp_path / folder.name / "table")

    whole, broken = tmp_path / "a", tmp_path / "b"
    code, said = end(program("compare", *arguments(whole)))
    assert code == 0, said
    broken.mkdir()
    (broken / "speeds.json").write_bytes((whole / "speeds.json").read_bytes())  # times are measured once, and differ
    def written():
        return sum(log.stat().st_size for log in broken.glob("*/log.jsonl"))

    moment, stopped = random.Random(3), 0
    for attempt in range(60):
        process, before = program("compare", *arguments(broken)), written()
        if attempt % 4 != 1:  # most while a run goes on, some at whatever comes first
            while process.is_alive() and written() <= before:
                time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.2))
        if process.is_alive():
            os.kill(process.pid, how)
            stopped += 1
        code, said = end(process)
        if code == 0:
            break
        assert code in (-how, 128 + how), said
    assert code == 0 and stopped >= 2, (stopped, said)
    mine, other = ((folder / "table.md").read_text().replace(str(folder), "") for folder in (broken, whole))
    assert mine == other
    a, b = (json.loads((folder / "table.json").read_text()) for folder in (whole, broken))
    strip = lambda runs: [{k: v for k, v in r.items() if k != "seconds"} for r in runs]  # noqa: E731
    assert strip(a["runs"]) == strip(b["runs"]) and a["variants"] == b["variants"]
