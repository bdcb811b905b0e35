"""The page, without a browser, in a working folder with runs that cannot be read and runs that are forged."""

import os

import pytest

testing = pytest.importorskip("streamlit.testing.v1", reason="needs requirements-demo.txt; make test-demo installs it")

from test_sample import MARKED, write_checkpoint

from helpers import ROOT

LOGS = {"first": '{"step": 1, "split": "train", "loss": 2, "stats": [{"spans": 5}, 3]}',
        "second": '{"step": 1, "split": "train", "loss": 2, "tokens_per_second": "x"}\n{"step": 2, "split": "val", "loss": 1}',
        "third": "[1]"}


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
    page = testing.AppTest.from_file(str(ROOT / "app.py"), default_timeout=120).run()

    def opened(part):
        page.session_state["part"] = part
        page.run()
        assert not page.exception, page.exception
        return page

    return opened


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
