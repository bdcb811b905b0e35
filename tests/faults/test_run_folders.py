"""What a run may move or overwrite in its folder: an earlier run's files, and nothing else."""

import os

import pytest
import torch
from fault_injection import count

import compare
import train
from core import runs
from helpers import call, write_bytes
from model import load

pytestmark = pytest.mark.usefixtures("quick")
SMALL = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--max_iters=2", "--eval_interval=2",
         "--eval_iters=1",
         "--batch_size=2", "--dtype=float32", "--warmup_iters=1", "--device=cpu")
ROW = "train.py into a folder of something else"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def assert_refused(refused, text):
    """A function of an out_dir, and of the folder that must be as it was, every byte of it, when the run was
    refused."""

    def check(out, folder, said, *arguments):
        before = content(folder)
        line = refused(train, f"--out_dir={out}", f"--dataset={text}", *SMALL, *arguments)
        lost = sum(content(folder).get(name) != kept for name, kept in before.items())
        count(ROW, refused=1, lost=lost)
        assert said in line and not lost and content(folder) == before

    return check


@pytest.mark.parametrize("files", [
    {"train.py": b"# script", "data/toy/prepare.py": b"# script"}, {"meta.json": b"{}", "train.bin": b"tokens"},
    {"config.json": b"{}", "pytorch_model.bin": b"weights"}, {"log.jsonl": b"{}\n", "notes.txt": b"mine"},
    {"earlier.part/train.py": b"mine", "other": b"mine"}, {".profile": b"mine"}, {"best.pt.txt": b"mine"},
    {"mybest.pt": b"mine"},
    {"Log.jsonl.d/a": b"mine"},
], ids=lambda files: " ".join(files))
def test_a_folder_of_something_else(assert_refused, tmp_path, files):
    for name, kept in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(kept)
    said = ", which is no file of a run of train.py: give another --out_dir, or move it away"
    assert_refused(tmp_path / "out", tmp_path, said, f"--init_from={'auto' if len(files) > 1 else 'scratch'}")


def test_the_working_folder_and_an_empty_value(assert_refused, tmp_path, monkeypatch):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "train.py").write_text("# script")
    monkeypatch.chdir(tmp_path / "repository")
    for out, said in ((".", "holds 'train.py', which is no file of a run"),
                      ("..", "holds 'repository', which is no file"),
                      ("", "out_dir expects the path of a folder, got nothing")):
        for arguments in ((), ("--init_from=resume",) * (out == ""), ("--eval_only=True",) * (out == "")):
            assert_refused(out, tmp_path, said, *arguments)


def test_the_data_as_out_dir(assert_refused, tmp_path):
    data = write_bytes(tmp_path / "data", train="abc" * 20, val="abc" * 20)
    assert_refused(data, tmp_path, "data holds 'meta.json', which is no file of a run", f"--dataset={data}")


def test_other_files_beside_a_run(assert_refused, text, tmp_path):
    """A second run is refused; to resume the first moves nothing and is allowed."""
    out = tmp_path / "out"
    assert not call(train, f"--out_dir={out}", f"--dataset={text}", *SMALL)
    (out / "notes.txt").write_text("mine")
    assert_refused(out, tmp_path, "holds 'notes.txt', which is no file of a run of train.py")
    assert not call(train, f"--out_dir={out}", f"--dataset={text}", *SMALL, "--max_iters=3", "--init_from=resume")
    assert (out / "notes.txt").read_text() == "mine" and load(out / "ckpt.pt")[1]["state"]["step"] == 3


def test_every_file_of_a_run_is_moved(reviews, tmp_path):
    """All that the scripts write into its folder: of training, pictures and comparisons."""
    pytest.importorskip("matplotlib")
    import plot

    out = tmp_path / "out"
    line = (f"--out_dir={out}", f"--dataset={reviews}", *SMALL)
    assert not call(train, *line, "--eval_test=True", "--attention=adaptive_attention_span")
    call(plot, out)
    call(plot, out, "--text=a film", "--layer=0", "--head=0")
    os.truncate(out / "log.jsonl", 0)  # the log is no mark of a run: its other files are as valuable
    runs.write_text(out / "result.json", "{}")  # as compare.py does
    (out / "ckpt.pt.part").write_bytes(b"half")
    (out / "ckpt-3.shards").mkdir()
    kept = content(out)
    assert not call(train, *line, "--max_iters=1")
    kept.pop("lock")
    assert content(tmp_path / "out.1") == kept and (tmp_path / "out.1" / "ckpt-3.shards").is_dir()
    assert len(kept) > 12 and torch.load(out / "ckpt.pt")["state"]["step"] == 1


@pytest.mark.parametrize("name", ["best.pt", "ckpt.pt", "ckpt-previous.pt", "config.json", "predictions-val.npz"])
def test_a_single_file_of_a_run_is_moved_too(text, tmp_path, name):
    """A checkpoint put into a folder by hand, without a log."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"valuable")
    assert not call(train, f"--out_dir={out}", f"--dataset={text}", *SMALL)
    assert content(tmp_path / "out.1") == {name: b"valuable"}
    count(ROW, resumed=1)


@pytest.mark.parametrize("after", [False, True])
def test_ended_while_a_run_is_moved_aside(tmp_path, monkeypatch, after):
    """At each call; the next run moves the rest to the same place, and what is not a run's is never touched."""
    made, rename = {name: name.encode() for name in ("best.pt", "ckpt.pt", "config.json", "log.jsonl")}, os.rename

    def ending(*arguments):
        calls.append(arguments)
        if len(calls) != at or after:
            rename(*arguments)
        if len(calls) == at:
            raise KeyboardInterrupt

    for at in range(1, len(made) + 2):
        out, calls = tmp_path / str(at) / "out", []
        out.mkdir(parents=True)
        for name, kept in {**made, "lock": b"", "mine": b"mine"}.items():
            (out / name).write_bytes(kept)
        monkeypatch.setattr(os, "rename", ending)
        with pytest.raises(KeyboardInterrupt):
            runs.prepare_folder(out)
        monkeypatch.setattr(os, "rename", rename)
        runs.prepare_folder(out)
        assert content(out.parent) == {"out/lock": b"", "out/mine": b"mine",
                                       **{f"out.1/{name}": made[name] for name in made}}


def test_compare_removes_no_other_folder(text, tmp_path, refused, monkeypatch):
    """Where a run's folder was begun by something else."""
    cost = {"seconds_per_step": 1, "work_per_step": 1, "parameters": 1}
    monkeypatch.setattr(compare, "measure", lambda variants, device, dtype: {v.name: cost for v in variants})
    folder = tmp_path / "out" / "dense-1"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    small = [each for each in SMALL if "iters" not in each and "interval" not in each]
    line = refused(compare, f"--out_dir={tmp_path / 'out'}",
                   f"--base={[f'--dataset={text}', *small]}", "--amount=1.0",
                   "--variants=['dense:', 'local: --attention=sparse']", "--seeds=[1, 2]")
    assert "holds 'thesis.txt', which is no file of a run" in line and (folder / "thesis.txt").read_text() == "mine"
