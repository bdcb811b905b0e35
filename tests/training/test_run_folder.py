"""The files of a run, and wandb."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from training_runs import SMALL, fit, log_of

import train
from core import runs
from core.dataset import Dataset

pytestmark = pytest.mark.usefixtures("quick")


def test_the_folder_of_a_run(folder, tmp_path):
    out = tmp_path / "not" / "yet" / "there"
    assert not fit(out, f"{folder}/", "--max_iters=6", "--log_interval=2")
    answers = {"predictions-val.npz"} if "reviews" in str(folder) else set()
    assert {file.name for file in out.iterdir()} == {"config.json", "log.jsonl", "ckpt.pt", "ckpt-previous.pt",
                                                     "best.pt", "lock"} | answers
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["max_iters"] == 6 and config["source"] == Dataset(folder).meta["source"]
    assert config["device"] == "cpu" and config["dtype"] == "float32"
    assert config["machine"]["torch"] == torch.__version__
    log = log_of(out)
    assert [(record["step"], record["split"]) for record in log if "whole" not in record] == \
        [(0, "val"), (0, "train"), (2, "train"), (4, "train"), (5, "val"), (6, "val")]
    extra = {"accuracy", "f1", "precision", "recall",
             "auc"} if "reviews" in str(folder) else {"accuracy", "bits_per_byte"}
    for record in log:
        assert math.isfinite(record["loss"])
        more = {"lr", "grad_norm"} if record["split"] == "train" else extra | {"stats", "work_per_token", "work"}
        more |= {"accuracy_by_length"} if "whole" in record and "reviews" in str(folder) else set()
        assert record.keys() - {"whole"} == {"step", "split", "loss"} | more
    raw = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(record["tokens_per_second"] > 0 and record["seconds"] > 0 for record in raw
               if record["split"] == "train")


def test_an_earlier_run_is_not_overwritten(text, tmp_path, capsys):
    out = tmp_path / "out"
    for n in range(3):
        assert not fit(out, text, f"--max_iters={n + 1}")
    assert [torch.load(folder / "ckpt.pt")["state"]["step"]
            for folder in (tmp_path / "out.1", tmp_path / "out.2", out)] \
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
    path.write_bytes((kept + line(0, "val", whole=True) + line(5) + line(6, "val") + "[]\n{}\n\n1\n").encode()
                     + b'{"st\xff')
    runs.mend_log(path, 5, 5)
    assert path.read_text() == kept
    runs.mend_log(tmp_path / "none.jsonl", 5, 5)


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
