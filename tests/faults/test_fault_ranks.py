"""A run in many processes of which one dies, is asked to stop, or finds a fault; and torchrun, which starts them
again."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from fault_injection import count, end, program, several
from rank_runs import MAX, SHAPE, alone, assert_close, begin, fit, free_port  # noqa: F401

from helpers import ROOT
from model import load

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")
ROW = "SIGKILL to one of two ranks, or nodes"


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
    assert all("train.bin was changed while in use" in said and "stopped at step 5, saved" in said
               for _, said in ends), ends
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
        processes = begin(2, out, text, faults=[("at_batch", (batch, "die"))])
        (code, said), (killed, _) = [end(process) for process in processes]
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


# ---- torchrun ----------------------------------------------------------------------------------


def torchrun(*words, out, data, more=()):
    """A torchrun of train.py, its output in a file; killing: (rank, batch): SIGKILL there, the first time."""
    program = [sys.executable, "-m", "torch.distributed.run", *words, "tests/faults/one_dies.py",
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
    code, said = ended(torchrun("--standalone", "--nproc_per_node=2", out=tmp_path / "out", data=text,
                                more=["--init_from=auto"]))
    assert code == 0 and "2 ranks" in said, said
    assert_close(alone("text"), tmp_path / "out")


@pytest.mark.parametrize("shard", ["False", "True"])
def test_a_rank_dies_and_comes_back(alone, text, tmp_path, monkeypatch, shard):
    """SIGKILL to one rank: torchrun starts all again, they go on from the checkpoint, and the end is the unbroken
    run's."""
    draw = random.Random(shard)
    for n in range(several(1, 2)):
        rank, batch, out = draw.randrange(2), draw.randrange(1, MAX), tmp_path / str(n)
        monkeypatch.setenv("DIES", f"{tmp_path}/died{n} {rank} {batch}")
        code, said = ended(torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=2", out=out, data=text,
                                    more=[f"--shard={shard}"]))
        assert code == 0 and (tmp_path / f"died{n}").exists(), said
        assert f"resume: from step {batch // 4 * 4} of 8" in said, said
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
