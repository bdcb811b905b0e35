"""What prepare.py may replace in a folder and what it must leave; full disks."""

import contextlib
import errno
import importlib
import itertools
import json
import os
import shutil

import pytest
from fault_injection import count

from core import prepare
from core.config import UserError
from core.dataset import Dataset, batches
from helpers import review, write_bytes, write_reviews

toy = importlib.import_module("data.toy.prepare")
sentences = importlib.import_module("data.sentences.prepare")
ROW = "prepare.py into a folder of something else"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prepared(out, source=None):
    toy.main(["--out_dir", str(out), *(["--source", str(source)] if source else [])])
    data = Dataset(out)
    batches(data, "train", 2, 8)
    data.check_files()


def assert_refused(out, message):
    """`out` is refused, before anything is read or written, and every byte of it stays."""
    before = content(out)
    with pytest.raises(UserError, match=message) as error:
        toy.main(["--out_dir", str(out)])
    lost = sum(content(out).get(name) != kept for name, kept in before.items())
    count(ROW, refused=1, lost=lost)
    assert not lost and content(out) == before and "\n" not in str(error.value)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("files", [
    {"pytorch_model.bin": b"weights", "config.json": b"{}"}, {"train.bin": b"tokens", "val.bin": b"tokens"},
    {"meta.json": b"{}"}, {"meta.json": b"{}", "train.bin": b"tokens"}, {"meta.json": b"not ours"},
    {"meta.json": b"{", "train.bin": b"tokens", "notes.txt": b"mine"},
    {"meta.json": b'["splits"]', "pytorch_model.bin": b"weights"},
    {"meta.json": b"{", "pytorch_model.bin": b"weights"}, {"deep/notes.txt": b"mine"}, {".hidden": b""},
    {"meta.json.part": b"{}", "train.bin": b"tokens"}, {"meta.json.part": b'["../x.bin"]', "train.bin": b"tokens"},
], ids=lambda files: " ".join(files))
def test_a_folder_of_something_else(tmp_path, files):
    for name, kept in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(kept)
    message = "holds .* and no meta.json that names it: it is a folder of something else; give a new"
    assert_refused(tmp_path / "out", message)


def test_other_files_of_our_folder_stay(tmp_path):
    out = tmp_path / "out"
    prepared(out)
    mine = {"pytorch_model.bin": b"weights", "notes.txt": b"mine", "sub/train.bin": b"tokens"}
    (out / "sub").mkdir()
    for name, kept in mine.items():
        (out / name).write_bytes(kept)
    (tmp_path / "own.txt").write_text("hello you\nhello there\n")
    for source in (tmp_path / "own.txt", None, tmp_path / "own.txt"):
        prepared(out, source)
        assert mine.items() <= content(out).items() and len(content(out)) == 4 + len(mine)
    count(ROW, injected=3)
    write_bytes(out, train="abc", test="abc")  # what only the older preparation had is removed
    assert set(content(out)) - set(mine) == {"train.bin", "test.bin", "meta.json"}
    (out / "val.bin").write_bytes(b"mine")
    before = content(out)
    with pytest.raises(UserError, match="holds val.bin, which its meta.json does not name: move it away"):
        prepared(out)
    assert content(out) == before


def test_names_in_meta_that_point_outside(tmp_path):
    """A forged meta.json names no file outside its folder."""
    out = tmp_path / "out"
    prepared(out)
    (tmp_path / "other.bin").write_bytes(b"mine")
    meta = json.loads((out / "meta.json").read_text())
    meta["splits"]["../other"] = meta["splits"]["train"]
    (out / "meta.json").write_text(json.dumps(meta))
    prepared(out)
    assert (tmp_path / "other.bin").read_bytes() == b"mine"


def test_an_empty_value(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    for option in ("--out_dir=", "--source="):
        with pytest.raises(UserError, match="--source and --out_dir expect a path, got nothing"):
            toy.main([f"--out_dir={tmp_path / 'out'}", option])
        count(ROW, refused=1)
    assert content(tmp_path) == {"model.bin": b"weights"}


def test_the_folders_of_data(tmp_path, monkeypatch):
    """data/NAME holds prepare.py, perhaps a download, and what an earlier version of it left when it was killed."""
    monkeypatch.setattr("core.prepare.ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    here = {"prepare.py": b"# script", "input.txt": b"downloaded", "a.zip.part": b"half",
            "pytorch_model.bin": b"weights"}
    for more in ({}, {"train.bin": b"half", "val.offsets.bin": b"half"}, {"meta.json": b"{", "test.bin": b""}):
        out = tmp_path / "data" / f"toy{len(more)}"
        out.mkdir(exist_ok=True)
        for name, kept in {**here, **more}.items():
            (out / name).write_bytes(kept)
        prepared(out)
        assert here.items() <= content(out).items()
        assert set(content(out)) - set(here) == {"train.bin", "val.bin", "test.bin", "meta.json"}


def test_beside_the_scripts_is_no_place(tmp_path, monkeypatch):
    """The repository, and data/ itself."""
    monkeypatch.setattr("core.prepare.ROOT", tmp_path / "repository")
    (tmp_path / "repository" / "data").mkdir(parents=True)
    (tmp_path / "repository" / "data" / "common.py").write_text("# script")
    for folder in (tmp_path / "repository", tmp_path / "repository" / "data"):
        assert_refused(folder, "it is a folder of something else")


# ---- ended half-way ----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up."""


@contextlib.contextmanager
def killed_at(number):
    """Within, the call of this number that changes a name on the disk does not come to pass, nor anything after it."""
    calls = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "mkdir"):
            def dying(*arguments, call=getattr(os, name), **more):
                if next(calls) == number:
                    raise Killed
                return call(*arguments, **more)

            patch.setattr(os, name, dying)
        patch.setattr(shutil, "rmtree", lambda *arguments, **more: None)
        yield


@pytest.mark.parametrize("older", ["nothing", "other text", "reviews"])
def test_killed_at_any_call_and_run_again(tmp_path, older):
    """The folder is then complete or not finished; the next preparation succeeds, and leaves its own files alone."""
    (tmp_path / "own.txt").write_text("hello you\nhello there\n")
    at, done = 0, False
    while not done:
        at += 1
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        if older == "reviews":
            write_reviews(out, train=[review(0)], val=[review(1)], unsup=[("a", None)])
        elif older == "other text":
            prepared(out, tmp_path / "own.txt")
        try:
            with killed_at(at):
                toy.main(["--out_dir", str(out)])
            done = True
        except Killed:
            count("prepare.py killed while it moves its files in", resumed=1)
        if (out / "meta.json").exists():
            data = Dataset(out)
            batches(data, "train", 1, 8)
            data.check_files()
        prepared(out)
        assert set(content(out)) == {"train.bin", "val.bin", "test.bin", "meta.json"}
    assert at > 7


def test_old_leftovers_alone_are_removed(tmp_path):
    ours, mine, young = (tmp_path / f"out.part-{name}" for name in ("abcd1234", "notes000", "young_12"))
    for folder in (ours, mine, young):
        folder.mkdir()
        (folder / "train.bin").write_bytes(b"tokens")
    (mine / "notes.txt").write_text("mine")
    for folder in (ours, mine):
        os.utime(folder, (0, 0))
    prepared(tmp_path / "out")
    assert not ours.exists() and content(mine) == {"train.bin": b"tokens", "notes.txt": b"mine"} and young.exists()


# ---- a folder that is damaged is prepared again ------------------------------------------------


@pytest.mark.parametrize("name, how", [("train.bin", "flipped"), ("train.bin", "gone"), ("val.labels.bin", "flipped"),
                                       ("test.offsets.bin", "cut")])
def test_a_damaged_folder_is_not_finished(tmp_path, name, how, capsys):
    """Its reader says: run its prepare.py again; and that then mends it."""
    out = tmp_path / "out"
    sentences.main(["--out_dir", str(out)])
    good = (out / name).read_bytes()
    bad = good[:-1] if how == "cut" else good[:-1] + bytes([good[-1] ^ 1])
    (out / name).unlink() if how == "gone" else (out / name).write_bytes(bad)
    capsys.readouterr()
    sentences.main(["--out_dir", str(out)])
    assert "nothing to do" not in capsys.readouterr().out and (out / name).read_bytes() == good
    sentences.main(["--out_dir", str(out)])
    assert "nothing to do" in capsys.readouterr().out


# ---- full disks --------------------------------------------------------------------------------


class FullFile:
    """A file on a disk that is full."""

    def __init__(self, *args, **more):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full_open(path, mode="r"):
        return FullFile() if "w" in mode else open(path, mode)

    monkeypatch.setattr(prepare, "open", full_open, raising=False)
    message = "could not write .*out: No space left on device; when that is mended, run it again"
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_limit(tmp_path):
    """The same with a real limit: no file may be longer."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match="could not write .*out: File too large; when that is mended"):
            write_bytes(tmp_path / "out", train="a" * 47438)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
