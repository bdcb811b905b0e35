"""Disks that are full or read-only, logs that were cut, downloads that break off."""

import hashlib
import os
import random
import re
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fault_injection
import pytest
from fault_injection import count, end, said_file, several
from fault_runs import assert_nothing_lost, begin, fit, half_done, lost

import plot
from core import readers
from core.checkpoint import PREVIOUS
from core.meta import digest_of
from helpers import call
from model import load

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")


# ---- disks -------------------------------------------------------------------------------------


def assert_as_before(out, before):
    """The last good checkpoint is what it was, to the bit."""
    assert {name: digest_of(out / name) for name in before} == before and load(out / "ckpt.pt")
    assert not list(out.glob("*.part"))


def test_full_disk_stops(whole, text, small_disk):
    out, draw = half_done(whole, text, small_disk / "out"), random.Random(2)
    size = (out / "ckpt.pt").stat().st_size
    for n in range(several(3, 12)):
        before = {name: digest_of(out / name) for name in ("ckpt.pt", PREVIOUS)}
        fault_injection.fill(small_disk / "ballast", draw.randint(0, int(1.1 * size)) if n else 0)
        code, said = fit(out, text, "--max_iters=11")  # an evaluation at 10, before the first step, and at the end
        (small_disk / "ballast").unlink()
        if code == 0:  # it was just enough
            shutil.rmtree(out)
            half_done(whole, text, out)
            continue
        assert code == 2 and re.search("train.py: could not write .*: No space left on device; the previous file",
                                       said), said
        assert_as_before(out, before)
        count("disk full while saving", refused=1)
    assert_nothing_lost("disk full while saving", whole, out, text)


def test_full_disk_goes_on(whole, text, small_disk):
    """With on_save_error=warn: what could not be saved is saved when there is room again, the log too."""
    row, out = "disk full while saving, on_save_error=warn", small_disk / "out"
    # a disk full for longer stops the run: only the last step could save
    for first, last in ((2, 2), (1, 3), (3, 6), (2, 6))[: several(2, 4)]:
        said = small_disk / "said"  # on the same disk
        faults = [("full_for", (str(small_disk), first, last))]
        code, words = end(begin(out, text, "--on_save_error=warn", faults=faults, said=said))
        assert code == 0 and "No space left on device; the previous file is intact; training goes on" in words, words
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
        before = {name: digest_of(out / name) for name in ("ckpt.pt", PREVIOUS)}
        code, said = fit(out, text, faults=[("file_limit", (draw.randint(least, size - 1),))])
        assert code == 2 and re.search("could not write .*: File too large; the previous file is intact", said), said
        # stopped at the first save, of step 15
        assert '"step": 15, "split": "train"' not in (out / "log.jsonl").read_text()
        assert_as_before(out, before)
        count("disk full while saving", refused=1)
    assert_nothing_lost("disk full while saving", whole, out, text)


def test_read_only_folder(whole, text, small_disk):
    out = half_done(whole, text, small_disk / "out")
    before = {name: digest_of(out / name)
              for name in ("ckpt.pt", PREVIOUS, "best.pt", "log.jsonl", "config.json")}
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in (out, small_disk / "new"):
        code, words = fit(folder, text)
        line = f"train.py: cannot write into {folder}: Read-only file system; give another"
        assert code == 2 and words.startswith(line), words
        count("read-only folder", refused=1)
    assert fit(out, text, "--eval_only=True")[0] == 0  # reading is allowed
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert_as_before(out, before)
    assert_nothing_lost("read-only folder", whole, out, text)


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
    assert drops >= 5 and path.read_bytes() == BODY
    assert Server.sent - before <= 1.1 * len(BODY)  # nothing was fetched twice
    path.unlink()

    for where, expected in (("error", "the server answered 503"), ("other", "expected sha256 .*, got")):
        process = get(where)
        code, words = end(process)
        assert code == 2 and re.search(expected, words) and not path.exists() and not part.exists(), words
        count("download: server error, wrong digest", refused=1)
