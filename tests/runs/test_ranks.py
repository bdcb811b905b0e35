"""One run in many processes: what several ranks compute, save and resume is what one does."""

import io
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from fault_injection import end, program
from rank_runs import KINDS, SHAPE, alone, assert_close, begin, fit, free_port  # noqa: F401
from training_runs import log_of

from core import dist
from core.dataset import Dataset, batches
from core.shards import MetadataUnpickler
from helpers import Trap
from model import load

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")


# ---- several ranks are one ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind, alone, request, tmp_path):
    said = fit(2, tmp_path / "out", request.getfixturevalue(KINDS[kind][0]), *KINDS[kind][1])
    assert "2 ranks" in said[0] and said[1] == ""  # one rank speaks
    assert_close(alone(kind), tmp_path / "out")
    assert log_of(alone(kind), "val")[0] == log_of(tmp_path / "out",
                                                   "val")[0]  # of the same weights an evaluation is the same
    a, b = (load(folder / "ckpt.pt")[1]["optimizer"] for folder in (alone(kind), tmp_path / "out"))
    for name in a:
        for key in a[name]:
            assert abs(torch.as_tensor(a[name][key] - b[name][key])).max() < 1e-6, (name, key)


def test_three_ranks_are_one(alone, text, tmp_path):
    fit(3, tmp_path / "out", text)
    assert_close(alone("text"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["accumulated", "reviews", "span", "layernorm", "bilstm"])
def test_sharded_ranks_are_one(kind, alone, request, tmp_path):
    fit(2, tmp_path / "out", request.getfixturevalue(KINDS[kind][0]), "--shard=True", *KINDS[kind][1])
    assert_close(alone(kind), tmp_path / "out")
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert "model" not in checkpoint and "optimizer" not in checkpoint
    sizes = [(tmp_path / "out" / checkpoint["shards"]["folder"] / f"__{rank}_0.distcp").stat().st_size
             for rank in range(2)]
    assert min(sizes) > 0.2 * sum(sizes)  # each wrote its part


def test_each_rank_reads_its_own_part(text, reviews, monkeypatch):
    """Of each step every text is read by one rank, and all of them by some; the shares add up to 1."""
    for folder, size in ((text, 6), (reviews, 5)):
        whole = batches(Dataset(folder), "train", size, 16, seed=1)
        for world in (2, 3, 4):
            monkeypatch.setattr(dist, "world", world)
            for micro_batches in (1, 2, 3, 4):
                dealt, shares = [], []
                for rank in range(world):
                    monkeypatch.setattr(dist, "rank", rank)
                    parts, own = dist.split_micro_batches(micro_batches)
                    dealt.append(own)
                    shares.append([whole.share(micro, part, parts) for micro, part in own])
                assert len({len(own) for own in dealt}) == 1
                every = sorted(sum(dealt, []))
                assert every == [(micro, part) for micro in range(micro_batches) for part in range(parts)]
                assert sum(sum(shares, [])) == pytest.approx(micro_batches)
                for micro in range(micro_batches):
                    pieces = [whole.rows(micro)[part::parts] for part in range(parts)]
                    assert sum(map(len, pieces)) == len(whole.rows(micro))
                    x = whole.batch(micro)[0]
                    rows = [row[: row.nonzero().max() + 1].tolist() for part in range(parts) if len(pieces[part])
                            for row in whole.batch(micro, part, parts)[0]]
                    assert sorted(rows) == sorted(row[: row.nonzero().max() + 1].tolist() for row in x)


@pytest.mark.parametrize("count, world", [(5, 2), (1, 4), (8, 4), (3, 1)])
def test_an_evaluation_is_shared(count, world, monkeypatch):
    monkeypatch.setattr(dist, "world", world)
    dealt = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", rank)
        dealt.append(dist.rank_indices(count))
    assert len({len(own) for own in dealt}) == 1 and set(sum(dealt, [])) == set(range(count))
    assert max(map(len, dealt)) == -(-count // world)


@pytest.mark.skipif(not os.path.exists("/proc/net/dev"), reason="counts bytes as Linux does")
def test_gradients_meet_once_a_step(text, tmp_path):
    """Bytes that two ranks send each other: four times the forward passes, the same messages but for one small one
    each."""
    def sent(*arguments):
        """Bytes a step, between the 10th and the 40th, over this machine's own network."""
        out = tmp_path / "-".join(arguments)
        faults = [("count_bytes", (str(out) + ".bytes",))]
        fit(2, out, text, "--n_embd=64", "--max_iters=40", "--eval_interval=100", "--log_interval=100", *arguments,
            faults=faults)
        marks = json.loads((tmp_path / (out.name + ".bytes")).read_text())
        return (marks["39"] - marks["10"]) / 29

    one, four = sent("--batch_size=2"), sent("--batch_size=2", "--gradient_accumulation_steps=4")
    assert four < 1.3 * one
    assert sent("--batch_size=2", "--shard=True") > 1.3 * one  # weights, too


@pytest.mark.skipif(not os.path.exists("/proc/net/dev"), reason="counts bytes as Linux does")
def test_what_ranks_send(tmp_path):
    """For each parameter: DDP and FSDP as a ring of two does, gloo's reduce-scatter as an all-reduce."""
    port, results = free_port(), tmp_path / "sent.json"
    line = ("ranks", "--n_layer=2", "--n_head=2", "--n_embd=256", "--batch_size=1", "--block_size=16", "--repeat=3",
            "--device=cpu", "--dtype=float32", f"--results={results}")
    ends = [end(process)
            for process in [program("bench", *line, faults=[("as_rank", (rank, 2, port))]) for rank in range(2)]]
    assert [code for code, _ in ends] == [0, 0] and ends[1][1] == "" and "| FSDP" in ends[0][1], ends
    rows = json.loads(results.read_text())["rows"]
    assert [(row["split"], row["forward passes"]) for row in rows] == [("DDP", 1), ("DDP", 4), ("FSDP", 1), ("FSDP", 4)]
    assert [row["bytes a parameter and rank"] for row in rows] == pytest.approx([4, 4, 8, 20], rel=0.02)
    assert [row["a ring's"] for row in rows] == [4, 4, 6, 18]


# ---- what they save ----------------------------------------------------------------------------


def test_other_numbers_of_ranks(alone, text, tmp_path, monkeypatch, capsys):
    """Begun by two ranks (DDP or FSDP), gone on by one, by three, split and whole: as one run all along."""
    for first in ("False", "True"):
        out, steps = tmp_path / first, iter((2, 4, 6, 7, 8))
        fit(2, out, text, f"--shard={first}", f"--max_iters={next(steps)}", "--eval_interval=1")
        for world, shard in ((1, "False"), (3, "True"), (2, "True"), (2, "False")):
            said = fit(world, out, text, f"--shard={shard}", f"--max_iters={next(steps)}", "--init_from=resume",
                       "--eval_interval=1")[0]
            assert "resume: from step" in said
            if world != 2:
                assert re.search(rf"ranks were \d, are now {world}: the same texts a step", said), said
        assert [record["loss"] for record in log_of(out, "train")] == pytest.approx(
            [record["loss"] for record in log_of(alone("text"), "train")], abs=1e-6)
        (a, _), (b, _) = load(out / "ckpt.pt"), load(alone("text") / "ckpt.pt")
        assert all((a.state_dict()[key] - weight).abs().max() < 1e-6 for key, weight in b.state_dict().items())
        assert not list(out.glob("*.shards")) or first  # those of no checkpoint are gone
        kept = {torch.load(out / name, weights_only=True).get("shards", {}).get("folder")
                for name in ("ckpt.pt", "ckpt-previous.pt", "best.pt")}
        assert {path.name for path in out.glob("*.shards")} == kept - {None}


def test_resumed_with_dropout_is_unbroken(text, tmp_path):
    """Each rank's random stream is saved; and every rank has another one, also where their number changed."""
    fit(3, tmp_path / "whole", text, "--dropout=0.3")
    fit(3, tmp_path / "cut", text, "--dropout=0.3", "--max_iters=4")
    shutil.copytree(tmp_path / "cut", tmp_path / "fewer")
    fit(3, tmp_path / "cut", text, "--dropout=0.3", "--init_from=resume")
    fit(2, tmp_path / "fewer", text, "--dropout=0.3", "--init_from=resume", "--max_iters=5")
    one, other, fewer = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
                         for name in ("whole", "cut", "fewer"))
    for key, weight in one["model"].items():  # to rounding: DDP sorts its messages anew after the first step
        assert (weight - other["model"][key]).abs().max() < 1e-6, key
    for checkpoint, number in ((one, 3), (fewer, 2)):
        assert len({stream["random"].numpy().tobytes() for stream in checkpoint["random"]}) == number


def test_scripts_read_what_ranks_saved(text, tmp_path):
    fit(2, tmp_path / "out", text, "--shard=True")
    code, said = end(program("sample", f"--out_dir={tmp_path / 'out'}", "--start=def", "--num_samples=1",
                             "--max_new_tokens=5",
                             "--device=cpu"))
    assert code == 0 and "def" in said, said
    code, said = end(program("train", f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SHAPE, "--eval_only=True"))
    best = [record for record in log_of(tmp_path / "out") if record.get("whole")][0]
    assert code == 0 and f"val: loss {best['loss']:.4f} nats" in said, said


def test_damaged_shards_are_refused(text, tmp_path):
    fit(2, tmp_path / "out", text, "--shard=True")
    folder = tmp_path / "out" / torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["shards"]["folder"]
    for name, damage, said in (("__1_0.distcp", lambda b: b[:-100], "not what was written"),
                               ("__0_0.distcp", lambda b: b[:900] + bytes([b[900] ^ 1]) + b[901:],
                                "not what was written"),
                               (".metadata", lambda b: b"", "not what was written"),
                               ("__1_0.distcp", None, "is missing")):
        whole = (folder / name).read_bytes()
        (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage(whole))
        code, words = end(begin(1, tmp_path / "out", text, "--init_from=resume")[0])
        assert code == 2 and said in words and "rename ckpt-previous.pt to ckpt.pt" in words, words
        (folder / name).write_bytes(whole)
    fit(1, tmp_path / "out", text, "--init_from=resume", "--max_iters=9")


@pytest.mark.parametrize("kind", ["trap", "foreign", "builtin"])
def test_no_pickle_of_shards_runs_code(kind, tmp_path):
    sprung = tmp_path / "sprung"
    value = {"trap": Trap(sprung), "foreign": {"storage_meta": np.zeros(1)}, "builtin": open}[kind]
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
        MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()
    assert not sprung.exists()


def test_refused(text, tmp_path):
    for arguments, said in ((("--batch_size=1",),
                             "2 ranks cannot share gradient_accumulation_steps=1 batches of batch_size=1"),
                            (("--device=mps",), "device mps is not there"),
                            (("--shard=True", "--dtype=float16"),
                             "training expects dtype 'auto', 'float32' or 'bfloat16', got 'float16'")):
        for code, words in [end(process) for process in begin(2, tmp_path / "out", text, *arguments)]:
            assert code == 2 and said in words, words
    assert not (tmp_path / "out").exists()
