"""Texts, names and options that data/text/prepare.py refuses, each with one sentence."""

import json

import pytest
from sources import pack, untouched, wrap
from test_text import NOTES, encoded, make, notes, text  # noqa: F401

from core.config import UserError
from helpers import ROOT


@pytest.mark.parametrize("name",
                         ["text", "imdb", "imdb_bytes", "toy_2", "..", "a/b", "/tmp/x", "a b", "", "é", "-a", "x" * 41])
def test_names_that_are_refused(notes, name):
    is_taken = name[:1] in ("t", "i")
    message = "is for a set of data/(text|imdb|toy)/prepare.py: choose another name" if is_taken else "expect"
    with pytest.raises(UserError, match=message):
        text.main([f"--source={notes}", f"--name={name}"])


def test_names_that_are_accepted():
    for name in ("notes", "text_2", "my-notes", "2024", "shakespeare"):
        assert text.parse([f"--source={ROOT}", f"--name={name}"]).out_dir == ROOT / "data" / name


@pytest.mark.parametrize("options, message", [
    (["--name=a"], "expected --source=FILE_OR_FOLDER, the text, and --name=NAME"),
    (["--source=x"], "expected --source=FILE_OR_FOLDER, the text, and --name=NAME"),
    (["--source=no/such", "--name=a"], "--source no/such: there is no such file or folder$"),
    (["--source=x", "--name=a", "--vocab_size=300"], "bytes has a vocabulary of its own"),
    *((["--source=x", "--name=a", *shares.split()], "expected --val_share above 0") for shares in
      ("--val_share=0", "--val_share=nan", "--test_share=-1", "--val_share=0.5 --test_share=0.5")),
])
def test_options_that_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("text " * 100)
    with pytest.raises(UserError, match=message):
        text.main(options)


GOOD = json.dumps({"text": "some text", "label": "a"}) + "\n"
LABELLED = "".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(8))


@pytest.mark.parametrize("files, message", [
    ({}, "expected UTF-8 text, found none (0 files, 0 of them not UTF-8 text, 0 blank documents)"),
    ({"a": b"\xff", "b.png": b"\0"}, "expected UTF-8 text, found none (2 files, 2 of them not UTF-8 text, 0 blank"),
    ({"a": b"", "b": b" \n"}, "expected UTF-8 text, found none (2 files, 0 of them not UTF-8 text, 2 blank documents)"),
    ({"a": b"ab"}, "too small to split: train would have 1 tokens; give more text"),
    ({"a": b"abcdefgh"}, "too small to split: val would have 1 tokens; give more text"),
    ({"a.jsonl": GOOD + "\n" + '{"label": "a"}'},
     'a.jsonl, line 3: expected an object with a text, like {"text": "...'),
    ({"a.jsonl": '{"text": 3}'}, "a.jsonl, line 1: expected an object with a text"),
    ({"a.jsonl": GOOD + "[1]\n"}, "a.jsonl, line 2: expected an object with a text"),
    ({"a.jsonl": GOOD + '{"text": "cut'}, "a.jsonl, line 2: expected an object with a text"),
    ({"a.jsonl": GOOD.encode() + b'{"text": "caf\xe9"}'}, "a.jsonl, line 2: expected an object with a text"),
    ({"a.jsonl": GOOD + "[" * 100_000}, "a.jsonl, line 2: expected an object with a text"),
    ({"a.jsonl": GOOD + '{"text": "x", "label": 0.5}'},
     "a.jsonl, line 2: expected a text or a whole number as label, got 0.5"),
    ({"a.jsonl": GOOD + '{"text": "x", "label": ""}'}, "line 2: expected a text or a whole number as label, got ''"),
    ({"a.jsonl": GOOD + '{"text": "x", "label": true}'},
     "line 2: expected a text or a whole number as label, got True"),
    ({"a.jsonl": GOOD + '{"text": "x", "label": ["a"]}'},
     "line 2: expected a text or a whole number as label, got ['a']"),
    ({"a.jsonl": GOOD + '{"text": "x"}'},
     "a.jsonl, line 2 has no label, those before it have one: give every document"),
    ({"a.jsonl": '{"text": "x"}\n' + GOOD},
     "a.jsonl, line 2 has a label, those before it have none: give every document"),
    ({"a.jsonl": GOOD, "readme.md": "hello"}, "readme.md has no label, those before it have one"),
    ({"a.jsonl": GOOD * 9},
     "expected labels of two classes, found 'a' alone; leave the labels out for a language model"),
    ({"a.jsonl": LABELLED + '{"text": "x", "label": "c"}'},
     "line 9 has a third label: expected two classes, found 'a', 'b', 'c'"),
    ({"a.jsonl": LABELLED[: len(LABELLED) // 2]},
     "expected 3 texts or more of each label, one for each split, found 2 of 'a'"),
])
def test_sources_that_are_refused(tmp_path, files, message):
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = make(tmp_path / "folder", tmp_path / "out", code=2)
    assert message in done.stderr and untouched(tmp_path / "out"), done.stderr


def test_a_damaged_archive_and_a_long_line(tmp_path, monkeypatch):
    source = pack(encoded(NOTES), tmp_path / "a.tar.gz")
    source.write_bytes(source.read_bytes()[:-100])
    assert "a.tar.gz cannot be read to its end" in make(source, tmp_path / "out", code=2).stderr
    monkeypatch.setattr("core.documents.LINE", 1000)
    source = wrap(GOOD.encode() + b"x" * 2000, tmp_path / "a.jsonl")
    assert "'a.jsonl, line 2' holds at least 2,000 bytes" in make(source, tmp_path / "out", code=2).stderr
    assert untouched(tmp_path / "out")
