"""Every prepare.py as its user runs it, on sources made here, also interrupted."""

import bz2
import gzip
import lzma
import os
import signal
import subprocess
import sys

import pytest
from sources import PLAY, load, pack, prepare, untouched, wrap

from core import prepare as shared
from core.download import Progress
from core.tokenizer import Tokenizer
from helpers import ROOT

# ---------------------------------------------------------------------------------------------------
# toy


def test_toy(tmp_path):
    out = tmp_path / "toy"
    done = prepare("toy", "--out_dir", out, cwd=tmp_path)
    meta, arrays = load(out)
    assert meta["vocab"] == "<s> i love deep learning artificial intelligence is fun cool models learn patterns".split()
    want = [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 0, 3, 4, 7, 8, 0, 5, 6, 7, 9, 0, 1, 2, 10, 0, 10, 11, 12]
    for split in ("train", "val", "test"):
        assert arrays[split].tolist() == want
        assert meta["splits"][split]["documents"] == 6 and f"{split:5s}" in done.stdout
    text = Tokenizer(meta).decode(want)
    assert text.splitlines()[1:] == ["i love deep learning", "i love artificial intelligence", "deep learning is fun",
                                     "artificial intelligence is cool", "i love models", "models learn patterns"]
    assert meta["splits"]["train"]["bytes"] == len(text.encode()) and meta["lossless"] is True
    assert (meta["format"], meta["kind"], meta["mark"], meta["dtype"], meta["partial"]) == (1, "lm", 0, "uint8", False)


def test_toy_again_is_free_and_other_text_is_not(tmp_path):
    out = tmp_path / "deep" / "toy"
    prepare("toy", "--out_dir", out, cwd=tmp_path)
    before = (out / "train.bin").stat()
    assert "nothing to do" in prepare("toy", "--out_dir", out, cwd=tmp_path).stdout
    assert (out / "train.bin").stat().st_mtime_ns == before.st_mtime_ns
    own = tmp_path / "own.txt"
    own.write_text("Hello there\n\n  hello you  \n")
    assert "nothing to do" not in prepare("toy", "--out_dir", out, "--source", own, cwd=tmp_path).stdout
    meta, arrays = load(out)
    assert arrays["val"].tolist() == [0, 1, 2, 0, 1, 3] and meta["lossless"] is False  # "Hello" lost its capital
    assert "nothing to do" not in prepare("toy", "--out_dir", out, cwd=tmp_path).stdout

# ---------------------------------------------------------------------------------------------------
# tiny Shakespeare: one plain file, in every wrapping


@pytest.mark.parametrize("name", "a.txt a.txt.gz a.txt.xz a.bz2 a.zip a.tar a.tar.gz folder a.wrong".split())
def test_shakespeare_sources(tmp_path, name):
    source = wrap(PLAY, tmp_path / name)
    out = tmp_path / "out"
    prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", out, cwd=tmp_path)
    meta, arrays = load(out)
    text = PLAY.decode()
    assert meta["vocab"] == sorted(set(text)) and meta["vocab_size"] == len(set(text)) and meta["mark"] is None
    cut = int(len(text) * 0.9)
    assert arrays["train"].tolist() == [meta["vocab"].index(c) for c in text[:cut]]
    assert Tokenizer(meta).decode(arrays["train"]) + Tokenizer(meta).decode(arrays["val"]) == text
    assert meta["partial"] is True and meta["source"]["content_bytes"] == len(PLAY) and "test" not in meta["splits"]
    assert meta["source"]["file"] == name and str(tmp_path) not in (out / "meta.json").read_text()


def test_shakespeare_sources_relative_and_among_others(tmp_path):
    pack({"readme": b"no", "deep/input.txt": PLAY}, tmp_path / "a.zip")
    prepare("shakespeare_char", "--source=a.zip", "--partial", "--out_dir=out", cwd=tmp_path)
    assert load(tmp_path / "out")[0]["source"]["content_bytes"] == len(PLAY)
    pack({"one": b"no", "two": PLAY}, tmp_path / "b.zip")
    done = prepare("shakespeare_char", "--source=b.zip", "--partial", "--out_dir=other", cwd=tmp_path, code=2)
    assert "b.zip holds 2 files" in done.stderr and "input.txt" in done.stderr


@pytest.mark.parametrize("make, message", [
    (lambda p: p.write_bytes(PLAY), "expected 1,115,394 bytes, found 147: give the whole file, or --partial"),
    (lambda p: p.write_bytes(b""), "is empty"),
    (lambda p: p.write_bytes(b"x" * 1_115_395), "more than the 1,115,394 bytes"),
    (lambda p: None, "there is no such file or folder"),
    (lambda p: p.write_bytes(gzip.compress(PLAY * 1000)[:-20]), "cannot be read to its end"),
    (lambda p: p.write_bytes(lzma.compress(PLAY * 1000)[:-20]), "cannot be read to its end"),
    (lambda p: p.write_bytes(bz2.compress(PLAY * 1000)[:-20]), "cannot be read to its end"),
    (lambda p: p.write_bytes(b"PK\3\4 and then nothing"), "cannot be read to its end"),
    (lambda p: p.write_bytes(gzip.compress(PLAY)[:-8] + b"\0" * 8), "cannot be read to its end"),
    (lambda p: p.mkdir(), "holds 0 files"),
], ids="short empty long missing cut-gz cut-xz cut-bz2 cut-zip bad-checksum empty-folder".split())
def test_refused_files(tmp_path, make, message):
    source, out = tmp_path / "input", tmp_path / "out"
    make(source)
    done = prepare("shakespeare_char", "--source", source, "--out_dir", out, cwd=tmp_path, code=2)
    assert message in done.stderr
    assert untouched(out)


def test_not_utf8(tmp_path):
    (tmp_path / "a").write_bytes(PLAY + b"\xff" + PLAY)
    done = prepare("shakespeare_char", "--source=a", "--partial", "--out_dir=out", cwd=tmp_path, code=2)
    assert "expected UTF-8 text, found b'\\xff' at byte 147" in done.stderr


def test_again(tmp_path):
    source, out = wrap(PLAY, tmp_path / "a.gz"), tmp_path / "out"
    options = ("--partial", "--out_dir", out)
    prepare("shakespeare_char", "--source", source, *options, cwd=tmp_path)
    assert "nothing to do" in prepare("shakespeare_char", "--source", source, *options, cwd="/").stdout
    source.rename(tmp_path / "b.gz")
    for again in (("--source=b.gz",), ()):  # a name says nothing
        assert "nothing to do" in prepare("shakespeare_char", *again, *options, cwd=tmp_path).stdout
    # without --partial a partial folder will not do
    prepare("shakespeare_char", "--source=b.gz", "--out_dir", out, cwd=tmp_path, code=2)
    load(out)  # and what was there is still there
    (out / "val.bin").write_bytes(b"cut")
    assert "nothing to do" not in prepare("shakespeare_char", "--source=b.gz", *options, cwd=tmp_path).stdout
    load(out)
    (out / "meta.json").write_text("{")
    assert "nothing to do" not in prepare("shakespeare_char", "--source=b.gz", *options, cwd=tmp_path).stdout
    wrap(PLAY + b"more", tmp_path / "b.gz")
    assert "nothing to do" not in prepare("shakespeare_char", "--source=b.gz", *options, cwd=tmp_path).stdout
    assert load(out)[0]["source"]["content_bytes"] == len(PLAY) + 4


# a script whose renames or writes are interrupted: {how} is what happens instead of the rename of {name}
DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from core import prepare as shared
from data.shakespeare_char import prepare
rename = os.replace
def replace(a, b):
    if str(b).endswith({name!r}):
        {how}
    rename(a, b)
shared.os.replace = replace
sys.argv[1:] = ["--source", {source!r}, "--partial", "--out_dir", {out!r}]
shared.run_script(prepare.main)
"""


@pytest.mark.parametrize("how, code", [
    ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143),
    ("os.kill(os.getpid(), signal.SIGINT)", 130),
    ("raise OSError(28, 'No space left on device')", 2),
], ids="kill term ctrl-c disk-full".split())
@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_interrupted(tmp_path, how, code, name):
    source, out = wrap(PLAY, tmp_path / "a.txt"), tmp_path / "out"
    # over an older finished folder, the harder case
    old = wrap(PLAY + PLAY, tmp_path / "old.txt")
    prepare("shakespeare_char", "--source", old, "--partial", "--out_dir", out, cwd=tmp_path)
    script = DRIVER.format(root=str(ROOT), name=name, how=how, source=str(source), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert not (out / "meta.json").exists()
    if code != -signal.SIGKILL:
        assert not list(tmp_path.glob("out.part*"))
    for left in tmp_path.glob("out.part*"):  # a kill leaves it; the next run an hour later removes it
        os.utime(left, (0, 0))
    again = prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", out, cwd=tmp_path)
    assert "nothing to do" not in again.stdout
    assert load(out)[0]["source"]["content_bytes"] == len(PLAY)
    assert not list(tmp_path.glob("out.part*"))


def test_out_dir_is_a_file(tmp_path):
    source, out = wrap(PLAY, tmp_path / "a.txt"), tmp_path / "out"
    out.write_text("mine")
    done = prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", out, cwd=tmp_path, code=2)
    assert "is a file" in done.stderr and out.read_text() == "mine"

# ---------------------------------------------------------------------------------------------------
# the rest


def test_progress_off_a_terminal_is_sparse(capsys):
    with Progress("working", 1000, "things") as progress:
        for _ in range(1000):
            progress.add(1)
    assert capsys.readouterr().err.splitlines() == ["working ...", "working: 1,000 of 1,000 things, 0 s"]


def test_dtypes():
    assert [shared.token_dtype(n).str for n in (2, 256, 257, 65536, 65537)] == ["|u1", "|u1", "<u2", "<u2", "<u4"]


@pytest.mark.parametrize("name", ["toy", "shakespeare_char", "stdlib", "enwik8", "imdb"])
def test_help(name, tmp_path):
    printed = prepare(name, "--help", cwd=tmp_path).stdout
    assert f"python data/{name}/prepare.py" in printed and "--source" in printed and "--out_dir" in printed
    assert ("--partial" in printed) == (name not in ("toy", "stdlib"))


def test_what_is_written_is_not_committed():
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    made = ["data/imdb/train.bin", "data/imdb/meta.json", "data/imdb/a.tar.gz", "data/imdb/a.tar.gz.part",
            "data/enwik8_chars/x", "data/imdb.part-abc/x", "data/shakespeare_char/input.txt", "data/enwik8/enwik8.zip"]
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", *made], capture_output=True, text=True).stdout
    assert ignored.split() == made
    kept = ["data/imdb/prepare.py", "data/common.py"]
    assert not subprocess.run(["git", "-C", str(ROOT), "check-ignore", *kept], capture_output=True, text=True).stdout
