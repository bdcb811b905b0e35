"""Scripts whose standard streams are closed, full or not writable: no traceback, and no file written to by mistake."""

import os
import subprocess
import sys

import pytest
from test_sample import MARKED, write_checkpoint

from helpers import ROOT

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from core.config import run_main

def main():
    with open("made", "wb", buffering=0) as file:  # gets no number of a standard stream, which others may write to
        assert file.fileno() > 2, file.fileno()
        print("said")
        sys.stdout.flush()
        os.write(1, b"by a library")
        assert sys.stdin.read() == "" and not sys.stdout.isatty()

run_main(main)
"""


def shell(command, folder):
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed(tmp_path, closed):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    done = shell(f"{sys.executable} script.py {closed}", tmp_path)
    assert done.returncode == 0 and (tmp_path / "made").read_bytes() == b"", done.stderr
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "said\nby a library")


@pytest.mark.parametrize("target, message", [("> /dev/full", "No space left"), ("1< /dev/null", "Bad file descriptor")])
def test_not_writable(tmp_path, target, message):
    """One sentence and exit code 2, also where only the last flush fails."""
    for line in ("print('said')", "print('said', flush=True)", "print('x' * 100000)"):
        (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                                            f"from core.config import run_main\nrun_main(lambda: {line})\n")
        done = shell(f"{sys.executable} script.py {target}", tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("script.py: ") and done.stderr.count("\n") == 1, done
        assert message in done.stderr


def test_sampling_into_nothing(tmp_path):
    out = write_checkpoint(tmp_path / "out", MARKED)
    command = (f"{sys.executable} {ROOT / 'sample.py'} --out_dir={out} --device=cpu --dtype=float32 --num_samples=1 "
               "--max_new_tokens=3 --start=a")
    done = shell(f"{command} >&-", tmp_path)
    assert done.returncode == 0 and "3 tokens, " in done.stderr
