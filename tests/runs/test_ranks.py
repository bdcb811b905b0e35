"""One run in many processes: what several ranks compute, save and resume is what one does; what happens when one dies.

Most ranks here are processes forked from one server that has imported torch; torchrun itself starts those of the tests
of what is its part: restarts and several nodes.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fault_injection import count, end, program, several
from training_runs import log_of

from core import dist
from core.shards import MetadataUnpickler
from core.dataset import Dataset, batches
from helpers import ROOT, Trap
from model import load

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")

MAX, ROW = 8, "SIGKILL to one of two ranks, or nodes"
SHAPE = ("--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=6", "--warmup_iters=2", "--eval_interval=4",
         "--eval_iters=3", "--log_interval=1", "--device=cpu", "--dtype=float32", f"--max_iters={MAX}", f"--lr_decay_iters={MAX}",
         "--learning_rate=1e-3", "--min_lr=1e-4")
KINDS = {
    "text": ("text", ()),
    "accumulated": ("text", ("--gradient_accumulation_steps=4", "--batch_size=3")),
    "uneven": ("text", ("--gradient_accumulation_steps=3", "--batch_size=5", "--grad_clip=0.2")),
    "recall": ("recall", ("--batch_size=3", "--gradient_accumulation_steps=3", "--eval_test=True")),
    "reviews": ("reviews", ("--batch_size=3", "--eval_test=True")),
    "span": ("text", ("--attention=adaptive_attention_span", "--use_triangle_wave_masking=True", "--span_reg=1e-3",
                      "--softness_span_mask=4", "--grad_clip=0.5", "--gradient_accumulation_steps=2")),
    "layernorm": ("text", ("--norm=layernorm", "--bias=True", "--pos=learned", "--tie=False")),
    "bilstm": ("reviews", ("--model=bilstm", "--attention=additive", "--hidden=8")),
}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def begin(world, out, data, *arguments, faults=(), of=1):
    """The processes of a run; `faults`: of one of them."""
    line, port = [f"--out_dir={out}", f"--dataset={data}", *SHAPE, *arguments], free_port()
    if world == 1:
        return [program("train", *line, faults=faults)]
    return [program("train", *line, faults=[("as_rank", (rank, world, port)), *(faults if rank == of else ())])
            for rank in range(world)]


def fit(world, out, data, *arguments, faults=()):
    """What each rank of a run said, which ends well."""
    ends = [end(process) for process in begin(world, out, data, *arguments, faults=faults)]
    assert {code for code, _ in ends} == {0}, ends
    return [said for _, said in ends]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, request):
    """A function: the folder of a kind's run in one process, made once."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("alone") / kind
            fit(1, made[kind], request.getfixturevalue(KINDS[kind][0]), *KINDS[kind][1])
        return made[kind]

    return run


def assert_close(one, other, tolerance=1e-6):
    """Two runs are the same within float32 rounding: each line of the log, the weights, AdamW's state, the best weights."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["split"]) == (b["step"], b["split"])
        for key in ("loss", "grad_norm", "bits_per_byte", "auc", "work"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=tolerance, abs=tolerance), (key, a, b)
    for name in ("ckpt.pt", "best.pt"):
        (a, facts), (b, others) = load(one / name), load(other / name)
        assert facts["state"]["step"] == others["state"]["step"] and facts["state"]["best_step"] == others["state"]["best_step"]
        for key, weight in a.state_dict().items():
            assert (weight - b.state_dict()[key]).abs().max() < tolerance, key


# ---- several ranks are one ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind, alone, request, tmp_path):
    said = fit(2, tmp_path / "out", request.getfixturevalue(KINDS[kind][0]), *KINDS[kind][1])
    assert "2 ranks" in said[0] and said[1] == ""  # one rank speaks
    assert_close(alone(kind), tmp_path / "out")
    assert log_of(alone(kind), "val")[0] == log_of(tmp_path / "out", "val")[0]  # of the same weights an evaluation is the same
    a, b = (load(folder / "ckpt.pt")[1]["optimizer"] for folder in (alone(kind), tmp_path / "out"))
    for name in a:
        for key in a[name]:
            assert (a[name][key] - b[name][key]).abs().max() < 1e-6, (name, key)


def test_three_ranks_are_one(alone, text, tmp_path):
    fit(3, tmp_path / "out", text)
    assert_close(alone("text"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["accumulated", "reviews", "span", "layernorm", "bilstm"])
def test_sharded_ranks_are_one(kind, alone, request, tmp_path):
    fit(2, tmp_path / "out", request.getfixturevalue(KINDS[kind][0]), "--shard=True", *KINDS[kind][1])
    assert_close(alone(kind), tmp_path / "out")
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert "model" not in checkpoint and "optimizer" not in checkpoint
    sizes = [(tmp_path / "out" / checkpoint["shards"]["folder"] / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
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
    """Bytes that two ranks send each other: four times the forward passes, the same messages but for one small one each."""
    def sent(*arguments):
        """Bytes a step, between the 10th and the 40th, over this machine's own network."""
        out = tmp_path / "-".join(arguments)
        faults = [("count_bytes", (str(out) + ".bytes",))]
        fit(2, out, text, "--n_embd=64", "--max_iters=40", "--eval_interval=100", "--log_interval=100", *arguments, faults=faults)
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
    ends = [end(process) for process in [program("bench", *line, faults=[("as_rank", (rank, 2, port))]) for rank in range(2)]]
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
    one, other, fewer = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole", "cut", "fewer"))
    for key, weight in one["model"].items():  # to rounding: DDP sorts its messages anew after the first step
        assert (weight - other["model"][key]).abs().max() < 1e-6, key
    for checkpoint, number in ((one, 3), (fewer, 2)):
        assert len({stream["random"].numpy().tobytes() for stream in checkpoint["random"]}) == number


def test_scripts_read_what_ranks_saved(text, tmp_path):
    fit(2, tmp_path / "out", text, "--shard=True")
    code, said = end(program("sample", f"--out_dir={tmp_path / 'out'}", "--start=def", "--num_samples=1", "--max_new_tokens=5",
                             "--device=cpu"))
    assert code == 0 and "def" in said, said
    code, said = end(program("train", f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SHAPE, "--eval_only=True"))
    best = [record for record in log_of(tmp_path / "out") if record.get("whole")][0]
    assert code == 0 and f"val: loss {best['loss']:.4f} nats" in said, said


def test_damaged_shards_are_refused(text, tmp_path):
    fit(2, tmp_path / "out", text, "--shard=True")
    folder = tmp_path / "out" / torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["shards"]["folder"]
    for name, damage, said in (("__1_0.distcp", lambda b: b[:-100], "not what was written"),
                               ("__0_0.distcp", lambda b: b[:900] + bytes([b[900] ^ 1]) + b[901:], "not what was written"),
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


# ---- faults ------------------------------------------------------------------------------------


def test_asked_of_one_rank_all_stop(alone, text, tmp_path):
    """SIGTERM to the second rank in the midst of step 3; then the run goes on."""
    processes = begin(2, tmp_path / "out", text, faults=[("at_batch", (3, "terminate"))])
    ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2 and "stopped at step 4, saved" in ends[0][1], ends
    fit(2, tmp_path / "out", text, "--init_from=resume")
    assert_close(alone("text"), tmp_path / "out")


def test_data_changed_for_one_rank(alone, text, tmp_path):
    """What one rank finds all say, at the same step, saved."""
    data = tmp_path / "data"
    shutil.copytree(text, data)
    whole = (data / "train.bin").read_bytes()
    processes = begin(2, tmp_path / "out", data, faults=[("at_batch", (5, "truncate", str(data / "train.bin"), 1000))])
    ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("train.bin was changed while in use" in said and "stopped at step 5, saved" in said for _, said in ends), ends
    (data / "train.bin").write_bytes(whole)
    fit(2, tmp_path / "out", data, "--init_from=resume")
    assert_close(alone("text"), tmp_path / "out")


@pytest.mark.parametrize("which", [0, 1])
def test_a_disk_full_for_one_rank(alone, text, tmp_path, which):
    """A rank cannot write its part: all say so, the checkpoint before is whole, and the run goes on from it."""
    out = tmp_path / "out"
    fit(2, out, text, "--shard=True", "--max_iters=4")
    before = {path.name: path.read_bytes() for path in out.glob("ckpt.pt")}
    processes = begin(2, out, text, "--shard=True", "--init_from=resume", faults=[("file_limit", (20_000,))], of=which)
    ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [2, 2], ends
    wanted = "could not write .*shards: File too large; the previous file is intact"
    assert all(re.search(wanted, said) for _, said in ends), ends
    assert before == {path.name: path.read_bytes() for path in out.glob("ckpt.pt")}
    fit(2, out, text, "--shard=True", "--init_from=resume")
    assert_close(alone("text"), out)
    count("disk full for one of two ranks", resumed=1, refused=1)


def test_a_rank_dies(alone, text, tmp_path):
    """Without torchrun nobody starts it again; the other one says so, and the run goes on from what is saved."""
    for batch in several((6,), (1, 4, 6)):
        out = tmp_path / str(batch)
        (code, said), (killed, _) = [end(process) for process in begin(2, out, text, faults=[("at_batch", (batch, "die"))])]
        assert killed == -signal.SIGKILL and code == 2 and "another rank has ended, and with it the run" in said, said
        fit(2, out, text, "--init_from=resume")
        assert_close(alone("text"), out)
        count(ROW, resumed=1)


def test_a_store_that_remembers_the_dead(alone, text, tmp_path):
    """torchrun keeps its store when it starts ranks again: none may take a dead one's address for a living one's."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for first in (0, 1):  # each waits for the other in turn
        processes = []
        for rank in (first, 1 - first):
            processes.append(program("train", f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SHAPE,
                                     faults=[("as_rank", (rank, 2, store.port, True))]))
            time.sleep(0.7)
        assert [end(process)[0] for process in processes] == [0, 0]
        assert_close(alone("text"), tmp_path / "out")


def test_refused(text, tmp_path):
    for arguments, said in ((("--batch_size=1",), "2 ranks cannot share gradient_accumulation_steps=1 batches of batch_size=1"),
                            (("--device=mps",), "device mps is not there"),
                            (("--shard=True", "--dtype=float16"), "training expects dtype 'auto', 'float32' or 'bfloat16', got 'float16'")):
        for code, words in [end(process) for process in begin(2, tmp_path / "out", text, *arguments)]:
            assert code == 2 and said in words, words
    assert not (tmp_path / "out").exists()


# ---- torchrun ----------------------------------------------------------------------------------


def torchrun(*words, out, data, more=()):
    """A torchrun of train.py, its output in a file; killing: (rank, batch): SIGKILL there, the first time."""
    program = [sys.executable, "-m", "torch.distributed.run", *words, "tests/runs/one_dies.py",
               f"--out_dir={out}", f"--dataset={data}", *SHAPE, *more]
    file = open(out.with_name(f"{out.name}-{time.monotonic_ns()}.said"), "w+")
    process = subprocess.Popen(program, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    process.file = file
    return process


def ended(process):
    code = process.wait(180)
    process.file.seek(0)
    return code, process.file.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_asked_to_stop(alone, text, tmp_path, number):
    """As the README starts it; all ranks stop at one step, which is saved, and another torchrun ends the run."""
    out = tmp_path / "out"
    process = torchrun("--standalone", "--nproc_per_node=2", out=out, data=text,
                       more=["--max_iters=1000000", "--eval_interval=1000000"])
    while process.poll() is None and not (out / "log.jsonl").exists() or "train" not in (out / "log.jsonl").read_text():
        time.sleep(0.05)
    process.send_signal(number)
    code, said = ended(process)
    step = load(out / "ckpt.pt")[1]["state"]["step"]
    assert code and f"stopped at step {step}, saved; go on with --init_from=resume" in said, said
    code, said = ended(torchrun("--standalone", "--nproc_per_node=2", out=out, data=text,
                                more=["--init_from=auto", f"--max_iters={step + 2}"]))
    assert code == 0 and f"resume: from step {step} of {step + 2}" in said, said


def test_torchrun(alone, text, tmp_path):
    code, said = ended(torchrun("--standalone", "--nproc_per_node=2", out=tmp_path / "out", data=text, more=["--init_from=auto"]))
    assert code == 0 and "2 ranks" in said, said
    assert_close(alone("text"), tmp_path / "out")


@pytest.mark.parametrize("shard", ["False", "True"])
def test_a_rank_dies_and_comes_back(alone, text, tmp_path, monkeypatch, shard):
    """SIGKILL to one rank: torchrun starts all again, they go on from the checkpoint, and the end is the unbroken run's."""
    draw = random.Random(shard)
    for n in range(several(1, 2)):
        rank, batch, out = draw.randrange(2), draw.randrange(1, MAX), tmp_path / str(n)
        monkeypatch.setenv("DIES", f"{tmp_path}/died{n} {rank} {batch}")
        code, said = ended(torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=2", out=out, data=text,
                                    more=[f"--shard={shard}"]))
        assert code == 0 and (tmp_path / f"died{n}").exists() and f"resume: from step {batch // 4 * 4} of 8" in said, said
        assert not out.with_name(f"{n}.1").exists()
        assert_close(alone("text"), out)
        count(ROW, resumed=1)


def test_two_nodes(alone, text, tmp_path, monkeypatch):
    """Two agents that meet at a rendezvous; a rank of the second one dies, and both start their ranks again."""
    monkeypatch.setenv("DIES", f"{tmp_path}/died 1 6")
    words = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=pair",
             f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    agents = [torchrun(*words, out=tmp_path / "out", data=text) for _ in range(2)]
    ends = [ended(agent) for agent in agents]
    assert [code for code, _ in ends] == [0, 0] and "resume: from step 4 of 8" in ends[0][1] + ends[1][1], ends
    assert_close(alone("text"), tmp_path / "out")
    count(ROW, resumed=1)
