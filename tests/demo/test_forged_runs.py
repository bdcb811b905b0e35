"""The page, without a browser, in a working folder with runs that cannot be read and runs that are forged."""

import json
import os
import time

import pytest

testing = pytest.importorskip("streamlit.testing.v1", reason="needs requirements-demo.txt; make test-demo installs it")

from test_sample import MARKED, REVIEWS, write_checkpoint

from helpers import ROOT

LOGS = {"first": '{"step": 1, "split": "train", "loss": 2, "stats": [{"spans": 5}, 3]}',
        "second": '{"step": 1, "split": "train", "loss": 2, "tokens_per_second": "x"}\n'
                  '{"step": 2, "split": "val", "loss": 1}',
        "third": "[1]"}


def new_page():
    """The page as a new visitor sees it."""
    return testing.AppTest.from_file(str(ROOT / "app.py"), default_timeout=120).run()


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A function of a part's name: the page with that part open, without an error of Python's."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "good", MARKED)
    for name in ("dangling", "fifo", *LOGS):
        (tmp_path / name).mkdir()
    (tmp_path / "dangling" / "best.pt").symlink_to("nowhere")
    for name in ("best.pt", "log.jsonl"):
        os.mkfifo(tmp_path / "fifo" / name)
    for name, content in LOGS.items():
        (tmp_path / name / "log.jsonl").write_text(content)
    page = new_page()

    def opened(part):
        page.session_state["part"] = part
        page.run()
        assert not page.exception, page.exception
        return page

    return opened


def write_run(folder, dataset, age):
    """A small classifier with a log and settings, written `age` seconds ago."""
    write_checkpoint(folder, REVIEWS)
    (folder / "log.jsonl").write_text(json.dumps({"step": 0, "split": "val", "loss": 0.7, "accuracy": 0.5, "auc": 0.5}))
    (folder / "config.json").write_text(json.dumps({"settings": {"dataset": dataset}}))
    for name in ("best.pt", "log.jsonl"):
        os.utime(folder / name, (time.time() - age,) * 2)


def test_the_page_opens_on_the_newest_run_that_is_no_toy(tmp_path, monkeypatch):
    """On a toy where no other run is; a run without a log comes last."""
    monkeypatch.chdir(tmp_path)
    for age, name, dataset in (300, "old", "imdb"), (200, "real", "imdb"), (100, "out-sentences", "sentences"):
        write_run(tmp_path / name, dataset, age)
    write_checkpoint(tmp_path / "newest", REVIEWS)
    assert new_page().multiselect[0].options == ["newest", "out-sentences", "real", "old"]
    for name in ("real", "old", "out-sentences", "newest"):
        assert new_page().multiselect[0].value == [name]
        (tmp_path / name / "best.pt").unlink()


def test_the_last_step_is_shown(page, tmp_path):
    """A finished run of 300 steps that logs every 250 shows 300."""
    lines = [{"step": 250, "split": "train", "loss": 1.0}, {"step": 300, "split": "val", "loss": 1.0},
             {"step": 300, "split": "val", "loss": 1.0, "whole": True}]
    (tmp_path / "first" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = page("Training")
    shown.multiselect[0].set_value(["first"]).run()
    assert {metric.label: metric.value for metric in shown.metric}["Step"] == "300"


def test_runs_that_cannot_be_read_empty_no_part(page):
    captions = [caption.value for caption in page("Text").caption]
    assert "dangling" in captions[0] and "No such file" in captions[0] and "got a pipe" in captions[0]
    assert page("Text").multiselect[0].options == ["good"]


def test_forged_logs(page):
    """What is right in them is shown; figures that are missing are said to be unknown."""
    shown = page("Training")
    assert sorted(shown.multiselect[0].options) == ["first", "second", "third"]
    shown.multiselect[0].set_value(["first", "second", "third"]).run()
    assert not shown.exception and ["holds no records yet" in error.value for error in shown.error] == [True]
    assert "unknown" in [metric.value for metric in shown.metric]
    assert not page("Patterns").error
