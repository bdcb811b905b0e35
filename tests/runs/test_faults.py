"""Faults, really done to real processes, and counted: what was tried, what went on from where it was, what was lost.

`make test` tries each a few times; `make test-faults` (FAULTS=1) many times, and writes results/faults.json.
"""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fault_injection
import pytest
import torch
from fault_injection import count, end, program, said_file, several

import plot
from core import readers
from core.checkpoint import PREVIOUS, check_whole, save
from core.config import UserError
from core.runs import digest
from helpers import ROOT, Trap, call
from model import load

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")

MAX, INTERVAL = 20, 5
SHAPE = ("--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=4", "--warmup_iters=2", "--dropout=0.2",
         "--gradient_accumulation_steps=2", f"--eval_interval={INTERVAL}", "--eval_iters=2", "--log_interval=1", "--device=cpu",
         "--dtype=float32", f"--max_iters={MAX}")


# ---- runs, and what one of them has lost -------------------------------------------------------


def line(out, data, *arguments):
    return [f"--out_dir={out}", f"--dataset={data}", *SHAPE, *arguments]


def begin(out, data, *arguments, faults=(), said=None):
    """A process of train.py that goes on from out/ckpt.pt, or begins where there is none."""
    resume = ["--init_from=resume"] * (out / "ckpt.pt").exists()
    return program("train", *line(out, data, *resume, *arguments), faults=faults, said=said)


def fit(out, data, *arguments, faults=()):
    """(exit code, the last line said) of a run."""
    code, text = end(begin(out, data, *arguments, faults=faults))
    return code, (text.strip().splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert fit(out, text)[0] == 0
    return out


def content(value):
    """[(name, bytes)] of nested tensors and plain values; without what depends on the clock and on where it runs."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    if isinstance(value, dict):
        return {str(key): content(part) for key, part in value.items() if key not in ("settings", "seconds")}
    return [content(part) for part in value] if isinstance(value, (list, tuple)) else repr(value).encode()


def unlike(a, b):
    """Bytes in which b is not as a; what b lacks counts whole."""
    if isinstance(a, bytes):
        return sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b)) if a != b else 0
    if isinstance(a, dict):
        return sum(unlike(part, b.get(key, type(part)())) for key, part in a.items())
    return sum(unlike(part, b[n] if n < len(b) else type(part)()) for n, part in enumerate(a))


def log_of(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    for record in records:
        for key in ("seconds", "tokens_per_second", "matmul_share"):
            record.pop(key, None)
    return [json.dumps(record).encode() for record in records]


def lost(whole, out):
    """Bytes of weights, optimiser, random stream, best weights and log in which a run that ended is not as the unbroken one."""
    total = 0
    for name in ("ckpt.pt", "best.pt"):
        total += unlike(*(content(torch.load(folder / name, weights_only=True)) for folder in (whole, out)))
    assert not list(out.glob("*.part"))
    return total + unlike(log_of(whole), log_of(out)) + (len(log_of(whole)) != len(log_of(out)))


def assert_nothing_lost(row, whole, out, data, *arguments):
    """Resume a run to its end; it must be as the unbroken one."""
    code, said = fit(out, data, *arguments)
    assert code == 0, said
    gone = lost(whole, out)
    count(row, injected=0, resumed=1, lost=gone)
    assert gone == 0


def half_done(whole, data, to, steps=10):
    """A run that was stopped after so many steps, in the folder `to`; made once, then copied."""
    made = whole.with_name(f"stopped-at-{steps}")
    if not made.exists():
        code, said = fit(made, data, faults=[("at_batch", (2 * steps - 1, "terminate"))])
        assert code == 128 + signal.SIGTERM and f"stopped at step {steps}, saved" in said
    shutil.copytree(made, to)
    return to


# ---- SIGKILL, and signals that ask -------------------------------------------------------------


def kill(process, out, draw, kind, duration):
    """SIGKILL at any moment, or within the writing of a checkpoint, of which the process makes twenty pieces."""
    if kind == "any":
        process.join(draw.uniform(0, duration))
    while kind == "writing" and process.is_alive():
        if list(out.glob("*.pt.part")):
            if draw.random() < 0.5:
                time.sleep(draw.uniform(0, 0.1))
                break
            while process.is_alive() and list(out.glob("*.pt.part")):
                time.sleep(0.002)
        time.sleep(0.001)
    process.kill()


def test_sigkill(whole, text, tmp_path):
    """At moments drawn at random: any, within the writing of a checkpoint, and around the system calls of that. Runs are
    killed and resumed until they end, one after the other, until there were enough kills."""
    draw, wanted, killed, inside, ended = random.Random(1), several(6, 50), 0, 0, 0
    began = time.monotonic()
    assert fit(tmp_path / "timed", text)[0] == 0 and lost(whole, tmp_path / "timed") == 0
    duration = time.monotonic() - began
    while killed < wanted:
        out, code = tmp_path / f"run{ended}", None
        while code != 0:
            kind = draw.choice(["any", "any", "writing", "call"]) if killed < wanted else "none"
            call = draw.choice(["fsync", "link", "replace"]), draw.randint(1, 12), draw.random() < 0.5
            faults = {"writing": [("slow_writes", (0.1,))], "call": [("killed_at", call)]}.get(kind, [])
            had = (out / "ckpt.pt").exists()
            process = begin(out, text, faults=faults)
            if kind in ("any", "writing"):
                kill(process, out, draw, kind, duration)
            code, said = end(process)
            assert code in (0, -signal.SIGKILL), said
            count("SIGKILL at random moments", bool(code), had and "resume: from step" in said)
            killed += bool(code)
            inside += bool(code) and bool(list(out.glob("*.pt.part")))
        gone, ended = lost(whole, out), ended + 1
        count("SIGKILL at random moments", 0, lost=gone)
        assert gone == 0
    count("of these inside the writing of a checkpoint", inside)
    print(f"{killed} kills, {inside} inside the writing of a checkpoint; {ended} runs to their end, each as the unbroken one")
    assert inside >= wanted / 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_ask(whole, text, tmp_path, number):
    draw = random.Random(int(number))
    for n in range(several(1, 6)):
        out, steps = tmp_path / str(n), draw.randint(1, MAX - 1)
        process = begin(out, text, faults=[("slow_steps", (0.02,))])
        while not (out / "log.jsonl").exists() or f'"step": {steps}, "split": "train"' not in (out / "log.jsonl").read_text():
            time.sleep(0.005)
        os.kill(process.pid, number)
        asked = time.monotonic()
        code, said = end(process)
        assert code == 128 + number and re.search(r"stopped at step \d+, saved", said) and time.monotonic() - asked < 20
        assert torch.load(out / "ckpt.pt")["state"]["step"] > steps
        count(signal.Signals(number).name)
        assert_nothing_lost(signal.Signals(number).name, whole, out, text)


def test_stopped_within_a_step(whole, text, tmp_path):
    """Between the forward passes of one step: what was done of it is done again."""
    code, said = fit(tmp_path / "out", text, faults=[("at_batch", (24, "terminate"))])
    assert code == 128 + signal.SIGTERM and "stopped at step 12, saved" in said
    count("SIGTERM")
    assert_nothing_lost("SIGTERM", whole, tmp_path / "out", text)


def test_signals_as_a_user_sends_them(text, tmp_path):
    """Without any help of these tests: python train.py, and Ctrl-C."""
    command = [sys.executable, ROOT / "train.py", *line(tmp_path / "out", text, "--max_iters=100000", "--eval_interval=1000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = [process.stdout.readline()]
    while "step 20/" not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], said
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "saved; go on with --init_from=resume" in rest and "Traceback" not in rest


# ---- disks -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def assert_as_before(out, before):
    """The last good checkpoint is what it was, to the bit."""
    assert {name: digest(open(out / name, "rb")) for name in before} == before and load(out / "ckpt.pt")
    assert not list(out.glob("*.part"))


def test_full_disk_stops(whole, text, small_disk):
    out, draw = half_done(whole, text, small_disk / "out"), random.Random(2)
    size = (out / "ckpt.pt").stat().st_size
    for n in range(several(3, 12)):
        before = {name: digest(open(out / name, "rb")) for name in ("ckpt.pt", PREVIOUS)}
        fault_injection.fill(small_disk / "ballast", draw.randint(0, int(1.1 * size)) if n else 0)
        code, said = fit(out, text, "--max_iters=11")  # an evaluation at 10, before the first step, and at the end
        (small_disk / "ballast").unlink()
        if code == 0:  # it was just enough
            shutil.rmtree(out)
            half_done(whole, text, out)
            continue
        assert code == 2 and re.search("train.py: could not write .*: No space left on device; what was there before", said), said
        assert_as_before(out, before)
        count("disk full while saving", refused=1)
    assert_nothing_lost("disk full while saving", whole, out, text)


def test_full_disk_goes_on(whole, text, small_disk):
    """With on_save_error=warn: what could not be saved is saved when there is room again, the log too."""
    row, out = "disk full while saving, on_save_error=warn", small_disk / "out"
    for first, last in ((2, 2), (1, 3), (3, 6), (2, 7))[: several(2, 4)]:
        said = small_disk / "said"  # on the same disk
        faults = [("full_for", (str(small_disk), first, last))]
        code, words = end(begin(out, text, "--on_save_error=warn", faults=faults, said=said))
        assert code == 0 and "No space left on device; what was there before is unchanged; training goes on" in words, words
        gone = lost(whole, out)
        count(row, last - first + 1, lost=gone)
        assert gone == 0
        shutil.rmtree(out)
    code, words = fit(out, text, "--on_save_error=warn", faults=[("full_for", (str(small_disk), 4, 99))])
    assert code == 2 and "could not write" in words  # the end of the training: there is no later evaluation
    (small_disk / "ballast").unlink()
    count(row, refused=1)
    assert_nothing_lost(row, whole, out, text)


def test_file_limit(whole, text, tmp_path):
    """The same without a disk of one's own: no file may be longer than some bytes, drawn at random."""
    out, draw = half_done(whole, text, tmp_path / "out"), random.Random(3)
    size, least = (out / "ckpt.pt").stat().st_size, (out / "log.jsonl").stat().st_size + 1000
    for n in range(several(3, 12)):
        before = {name: digest(open(out / name, "rb")) for name in ("ckpt.pt", PREVIOUS)}
        code, said = fit(out, text, faults=[("file_limit", (draw.randint(least, size - 1),))])
        assert code == 2 and re.search("could not write .*: File too large; what was there before is unchanged", said), said
        assert '"step": 15, "split": "train"' not in (out / "log.jsonl").read_text()  # stopped at the first save, of step 15
        assert_as_before(out, before)
        count("disk full while saving", refused=1)
    assert_nothing_lost("disk full while saving", whole, out, text)


def test_read_only_folder(whole, text, small_disk):
    out = half_done(whole, text, small_disk / "out")
    before = {name: digest(open(out / name, "rb")) for name in ("ckpt.pt", PREVIOUS, "best.pt", "log.jsonl", "config.json")}
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in (out, small_disk / "new"):
        code, words = fit(folder, text)
        assert code == 2 and words.startswith(f"train.py: cannot write into {folder}: Read-only file system; give another"), words
        count("read-only folder", refused=1)
    assert fit(out, text, "--eval_only=True")[0] == 0  # reading is allowed
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert_as_before(out, before)
    assert_nothing_lost("read-only folder", whole, out, text)


# ---- checkpoints -------------------------------------------------------------------------------


def assert_refused(path, said):
    with pytest.raises(UserError, match=said) as error:
        load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_cut_and_flipped_checkpoints(whole, text, tmp_path):
    out, draw = half_done(whole, text, tmp_path / "out"), random.Random(4)
    path = out / "ckpt.pt"
    good = path.read_bytes()
    said = f"ckpt.pt is damaged .*: rename {PREVIOUS} to ckpt.pt to go on from there"
    lengths = [0, 1, len(good) - 1, len(good) - 64, len(good) - 72, len(good) - 73]
    for length in lengths + draw.choices(range(len(good)), k=several(10, 300)):
        path.write_bytes(good[:length])
        assert_refused(path, said)
        count("checkpoint cut at any length", refused=1)
    for _ in range(several(20, 500)):
        place, mask = draw.randrange(len(good)), draw.randrange(1, 256)
        path.write_bytes(good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :])
        assert_refused(path, said)
        count("a byte of a checkpoint flipped", refused=1)
    code, words = fit(out, text)
    assert code == 2 and re.search(said, words)
    os.replace(out / PREVIOUS, path)  # as it says
    assert_nothing_lost("a byte of a checkpoint flipped", whole, out, text)


def test_what_is_offered(whole, text, tmp_path):
    out = half_done(whole, text, tmp_path / "out")
    for name in ("best.pt", "ckpt.pt", PREVIOUS):
        (out / name).write_bytes((out / name).read_bytes()[:-100])
        if name == "best.pt":
            assert_refused(out / name, f"whole beside it: ckpt.pt and {PREVIOUS}")
            code, said = fit(out, text)
            assert code == 2 and "best.pt is damaged" in said and "take it away to go on without it" in said
    assert_refused(out / "ckpt.pt", "no other beside it is whole: train again")


def test_without_best(whole, text, tmp_path):
    """best.pt taken away: the best is counted from there on, which is said, and the weights of the run are not touched."""
    out = half_done(whole, text, tmp_path / "out")
    (out / "best.pt").unlink()
    code, said = end(begin(out, text))
    assert code == 0 and "best.pt is missing: the best weights are counted from here on" in said
    assert unlike(*(content(torch.load(folder / "ckpt.pt")["model"]) for folder in (whole, out))) == 0
    (out / "best.pt").unlink()
    assert fit(out, text)[0] == 0 and load(out / "best.pt") and len(log_of(out)) == len(log_of(whole))


def test_checkpoints_of_earlier_versions(whole, tmp_path):
    """They have no digest; a checksum of each part finds what torch.load does not."""
    path, draw, unseen = tmp_path / "ckpt.pt", random.Random(5), 0
    checkpoint = torch.load(whole / "ckpt.pt", weights_only=True)
    del checkpoint["sealed"]
    torch.save(checkpoint, path)
    good, kept = path.read_bytes(), content(checkpoint["model"])
    assert load(path)[1]["state"] == checkpoint["state"] and not check_whole(path)
    start = good.index(checkpoint["model"]["embedding.weight"].numpy().tobytes())
    for place in draw.choices(range(start, start + 4000), k=several(10, 100)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        unseen += content(torch.load(path, weights_only=True)["model"]) != kept
        assert_refused(path, "is damaged or not a checkpoint of train.py .a part of it is not what was written")
        count("a byte of a checkpoint flipped", refused=1)
    assert unseen  # so the check is needed


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_checkpoints(whole, text, reviews, tmp_path):
    """Of another model, of other data, weights without a state, and pickles that would run code."""
    out, sprung = half_done(whole, text, tmp_path / "out"), tmp_path / "sprung"
    row = "foreign checkpoints, and pickles that would run code"
    good = {name: (out / name).read_bytes() for name in ("ckpt.pt", "best.pt")}
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)

    def torch_file(content):
        save(tmp_path / "made.pt", content)
        return (tmp_path / "made.pt").read_bytes()

    other = {**checkpoint, "model_config": {**checkpoint["model_config"], "n_embd": 32}}
    cases = [(good["best.pt"], "holds no optimizer, random, scaler"), (torch_file(other), "is damaged or not a checkpoint"),
             (torch_file({**checkpoint, "optimizer": {}}), "a state of the optimiser that does not"),
             (torch_file({**checkpoint, "state": [1]}), "a state of the optimiser that does not"),
             (torch_file({**checkpoint, "model": Trap(sprung)}), "is damaged or not a checkpoint"),
             (torch_file({"sealed": Trap(sprung)}), "is damaged or not a checkpoint"),
             (pickle.dumps(Trap(sprung)), "is damaged or not a checkpoint"),
             (pickle.dumps({"model": Trap(sprung)}), "is damaged or not a checkpoint")]
    for content, said in cases:
        (out / "ckpt.pt").write_bytes(content)
        code, words = fit(out, text)
        assert code == 2 and said in words, words
        (out / "best.pt").write_bytes(content if "damaged" in said else good["best.pt"])
        if "damaged" in said:
            for name, more in (("sample", []), ("train", ["--eval_only=True", f"--dataset={text}"])):
                code, words = end(program(name, f"--out_dir={out}", *more))
                assert code == 2 and said in words, words
        (out / "best.pt").write_bytes(good["best.pt"])
        count(row, refused=1)
    assert not sprung.exists()
    (out / "ckpt.pt").write_bytes(good["ckpt.pt"])
    code, words = fit(out, reviews)
    assert code == 2 and "was trained on other data" in words and "expected" in words and "found" in words
    count(row, refused=1)
    assert_nothing_lost(row, whole, out, text)


# ---- data --------------------------------------------------------------------------------------


@pytest.fixture
def data(text, tmp_path):
    """A copy of the data that may be spoiled."""
    return Path(shutil.copytree(text, tmp_path / "data"))


def test_data_that_is_not_what_it_was_at_the_start(whole, text, tmp_path, data):
    out, row = half_done(whole, text, tmp_path / "out"), "data cut, empty, replaced or of another vocabulary, at the start"
    good = {name: (data / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    tokens, meta = good["train.bin"], json.loads(good["meta.json"])
    del meta["splits"]["train"]["sha256"]
    cases = [("train.bin", tokens[:-1], "expected 50,000 bytes, found 49,999"),
             ("train.bin", b"", "expected 50,000 bytes, found 0"),
             ("val.bin", b"", "expected 500 bytes, found 0"), ("train.bin", None, "expected 50,000 bytes, found 0"),
             ("train.bin", tokens[::-1], "expected sha256 [0-9a-f]{64}, as its meta.json says, found [0-9a-f]{64}"),
             ("train.bin", tokens[:-1] + b"!", "expected sha256"), ("val.bin", good["val.bin"][:-1] + b"!", "expected sha256"),
             ("meta.json", good["meta.json"][:-100], "meta.json is damaged"), ("meta.json", b"", "meta.json is damaged"),
             ("meta.json", json.dumps({**meta, "vocab_size": 300}).encode(), "meta.json is damaged"),
             ("meta.json", json.dumps({**meta, "source": {"file": "other"}}).encode(), "other data .*source: expected .*, found"),
             ("meta.json", json.dumps({**meta, "tokenizer": "chars", "vocab": ["a", "b"], "vocab_size": 2}).encode(),
              "other data .*tokenizer: expected 'bytes', found 'chars'"),
             ("meta.json", json.dumps(meta).encode(), "other data .*sha256 of train: expected '[0-9a-f]{64}', found None")]
    for name, content, said in cases:
        (data / name).unlink() if content is None else (data / name).write_bytes(content)
        code, words = fit(out, data)
        assert code == 2 and re.search(said, words), words
        (data / name).write_bytes(good[name])
        count(row, refused=1)
    assert_nothing_lost(row, whole, out, data)


CHANGES = [("truncate", (1000,)), ("truncate", (0,)), ("replace", (bytes(50000),)), ("replace", (b"short",)),
           ("overwrite", (b"other",)), ("remove", ())]


@pytest.mark.parametrize("change, details", CHANGES[:: several(2, 1)])
def test_data_changed_during_training(whole, text, tmp_path, data, change, details):
    """Seen before anything of it is used: what was learnt from the right data is saved, and once it is back the run goes on."""
    out, row = half_done(whole, text, tmp_path / "out"), "data replaced, cut or removed during training"
    name, at = "val.bin" if change == "overwrite" else "train.bin", 13
    good = (data / name).read_bytes()
    code, words = fit(out, data, faults=[("at_batch", (27, change, str(data / name), *details))])
    assert code == 2 and re.search(f"{name}.*expected .* found .*; stopped at step {at}, saved: then go on with", words), words
    assert torch.load(out / "ckpt.pt")["state"]["step"] == at
    (data / name).write_bytes(good)
    count(row, refused=1)
    assert_nothing_lost(row, whole, out, data)


def test_data_rewritten_as_it_was(whole, text, tmp_path, data):
    faults = [("at_batch", (26, "replace", str(data / "train.bin"), (data / "train.bin").read_bytes()))]
    code, words = fit(half_done(whole, text, tmp_path / "out"), data, faults=faults)
    assert code == 0 and lost(whole, tmp_path / "out") == 0, words


# ---- numbers that are none ---------------------------------------------------------------------


@pytest.mark.parametrize("where, said", [("loss", "the training loss is nan"),
                                         ("gradient", "the norm of the gradient is (nan|inf)")])
def test_not_finite(whole, text, tmp_path, where, said):
    for step in several((12,), (11, 13, 15, 17, 19)):
        out = half_done(whole, text, tmp_path / str(step))
        code, words = fit(out, text, faults=[("remember_models", ()), ("at_batch", (2 * step, "poison", where))])
        assert code == 2 and re.search(f"{said} at step {step}: stopped; what is saved in {out} is from before", words), words
        for name in ("ckpt.pt", "best.pt"):
            assert all(tensor.isfinite().all() for tensor in load(out / name)[1]["model"].values())
        count("NaN or infinity in loss or gradients", refused=1)
        assert_nothing_lost("NaN or infinity in loss or gradients", whole, out, text)


# ---- two runs, one folder ----------------------------------------------------------------------


def test_two_runs_into_one_folder(whole, text, tmp_path):
    row = "a second run into a folder in use"
    for n in range(several(1, 5)):
        out = half_done(whole, text, tmp_path / str(n))
        first = begin(out, text, faults=[("slow_steps", (0.5,))])
        while not (out / "lock").exists() or (out / "lock").read_text() != str(first.pid):
            time.sleep(0.01)
        for arguments in ((), ("--init_from=scratch",)):
            code, words = fit(out, text, *arguments)
            assert code == 2 and f"{out} is in use by another run (process {first.pid})" in words, words
            count(row, refused=1)
        assert first.is_alive()
        if n % 2:  # nothing stays locked
            first.kill()
            first.join()
            assert_nothing_lost(row, whole, out, text)
        else:
            assert end(first)[0] == 0 and lost(whole, out) == 0


def test_runs_begun_at_once(whole, text, tmp_path):
    """One of several goes on, whichever; the earlier run in the folder is moved aside once and whole."""
    for n in range(several(1, 5)):
        out = half_done(whole, text, tmp_path / str(n) / "out")
        kept = digest(open(out / "ckpt.pt", "rb"))
        started = [begin(out, text, "--init_from=scratch", faults=[("slow_steps", (0.1,))]) for _ in range(3)]
        ends = [end(process) for process in started]
        done = [code for code, _ in ends].count(0)
        assert sorted({code for code, _ in ends}) in ([0, 2], [0]) and done >= 1  # a slow one may begin when another is done
        assert all("is in use by another run" in words for code, words in ends if code)
        assert lost(whole, out) == 0 and digest(open(tmp_path / str(n) / "out.1" / "ckpt.pt", "rb")) == kept
        assert len(list(out.parent.iterdir())) == 1 + done
        count("runs begun at once in one folder", len(ends), refused=len(ends) - done)


def test_killed_while_an_earlier_run_is_moved_aside(whole, text, tmp_path):
    for at in several((3,), range(1, 7)):
        out = half_done(whole, text, tmp_path / str(at) / "out")
        names = {path.name for path in out.iterdir()} - {"lock"}
        process = begin(out, text, "--init_from=scratch", faults=[("killed_at", ("rename", at, True))])
        assert end(process)[0] == -signal.SIGKILL
        assert fit(out, text, "--init_from=scratch")[0] == 0 and lost(whole, out) == 0
        assert names <= {path.name for path in (out.parent / "out.1").iterdir()} and not (out.parent / "out.2").exists()
        count("SIGKILL while an earlier run is moved aside")


# ---- the log -----------------------------------------------------------------------------------


def test_log_cut(whole, text, tmp_path):
    out, draw, row = half_done(whole, text, tmp_path / "out"), random.Random(6), "the log cut within its last line"
    good = (out / "log.jsonl").read_bytes()
    last = good.rindex(b"\n", 0, -1) + 1
    cuts = draw.sample(range(last + 1, len(good) - 1), several(5, 50))
    for n, cut in enumerate(cuts):
        (out / "log.jsonl").write_bytes(good[:cut])
        records, _ = readers.read_log(out / "log.jsonl")
        assert len(records) == good[:cut].count(b"\n")
        if n < several(1, 5):
            call(plot, out)
            assert (out / "curves.png").stat().st_size > 1000
        count(row)
    for cut in cuts[: several(1, 10)]:  # the checkpoint never knows of a step that the log may lack
        other = half_done(whole, text, tmp_path / str(cut))
        os.replace(other / PREVIOUS, other / "ckpt.pt")
        (other / "log.jsonl").write_bytes(good[:cut])
        assert_nothing_lost(row, whole, other, text)


# ---- downloads ---------------------------------------------------------------------------------

BODY = random.Random(7).randbytes(400_000)
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """/file, slowly; /drop breaks off; /error; /other is something else of the same size."""

    sent = 0

    def do_GET(self):
        if self.path == "/error":
            return self.send_error(503)
        body = bytes(len(BODY)) if self.path == "/other" else BODY
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + 50_000 if self.path == "/drop" else len(body)
        try:
            for place in range(start, min(end, len(body)), 10_000):
                self.wfile.write(body[place : place + 10_000])
                Server.sent += len(body[place : place + 10_000])
                time.sleep(0.005 if self.path == "/file" else 0)
        except OSError:
            pass  # the client was killed

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_downloads(server, tmp_path):
    draw, path, part = random.Random(8), tmp_path / "a.zip", tmp_path / "a.zip.part"

    def get(where, size=len(BODY)):
        said = said_file()
        process = fault_injection.start("download", f"{server}/{where}", str(path), size, DIGEST, str(said))
        process.said = said
        return process

    row, kills = "download: SIGKILL", 0
    while kills < several(2, 10):
        process = get("file")
        begun = part.stat().st_size if part.exists() else 0
        wait = draw.randint(1, 60_000)
        while process.is_alive() and (part.stat().st_size if part.exists() else 0) < begun + wait:
            time.sleep(0.002)
        process.kill()
        process.join()
        kills += 1
        if path.exists():
            assert path.read_bytes() == BODY
            path.unlink()
        elif part.exists():
            have = part.read_bytes()
            assert BODY.startswith(have) and len(have) >= begun
            count(row, 0, resumed=1)
        count(row)
    process = get("file")
    assert end(process)[0] == 0 and path.read_bytes() == BODY
    path.unlink()

    row, before, drops = "download: the connection breaks off", Server.sent, 0
    while not path.exists():
        process = get("drop")
        code, words = end(process)
        if code:
            assert code == 2 and "broke off after" in words and "run again to go on" in words
            drops += 1
            count(row, resumed=1)
    assert drops >= 5 and path.read_bytes() == BODY and Server.sent - before <= 1.1 * len(BODY)  # nothing was fetched twice
    path.unlink()

    for where, expected in (("error", "the server answered 503"), ("other", "expected sha256 .*, got")):
        process = get(where)
        code, words = end(process)
        assert code == 2 and re.search(expected, words) and not path.exists() and not part.exists(), words
        count("download: server error, wrong digest", refused=1)


# ---- other circumstances -----------------------------------------------------------------------


def test_resume_in_other_circumstances(whole, text, tmp_path):
    """Another precision, a longer run, and (where there is one) a GPU and back; each says what is not as it was."""
    cases = [(["--dtype=bfloat16"], "dtype was 'float32', is now 'bfloat16': the losses from here on differ by rounding"),
             (["--max_iters=30"], f"max_iters was {MAX}, is now 30")]
    if torch.cuda.is_available():
        cases += [(["--device=cuda"], "device was 'cpu', is now 'cuda'"), (["--device=cuda", "--dtype=float16"], "'float16'")]
    for n, (arguments, said) in enumerate(cases):
        out = half_done(whole, text, tmp_path / str(n))
        code, words = end(begin(out, text, *arguments))
        assert code == 0 and said in words and "resume: from step 10" in words, words
        assert abs(load(out / "ckpt.pt")[1]["state"]["best"] - load(whole / "ckpt.pt")[1]["state"]["best"]) < 0.3
        code, words = end(begin(out, text, "--max_iters=35"))
        assert code == 0 and ("dtype was" in words) == ("dtype" in said)
        count("resumed on another device, in another precision, for more steps", 2, resumed=2)
