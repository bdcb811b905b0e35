"""What the tests of prepare.py share: running scripts, checks of folders, sources in every wrapping."""

import bz2
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from core.prepare import run_script
from helpers import ROOT

PLAY = ("First Citizen:\nBefore we proceed, hear me speak.\n" * 3).encode()


def script(name):
    """The module data/NAME/prepare.py."""
    return importlib.import_module(f"data.{name}.prepare")


def run_here(name, arguments, cwd):
    """data/NAME/prepare.py as its user starts it, but inside this process: stdout, stderr, returncode."""
    out, err, before, handler = io.StringIO(), io.StringIO(), os.getcwd(), signal.getsignal(signal.SIGTERM)
    try:
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["prepare.py", *arguments])
            with pytest.raises(SystemExit) as left:
                run_script(script(name).main)
    finally:
        os.chdir(before)
        signal.signal(signal.SIGTERM, handler)
    return SimpleNamespace(returncode=left.value.code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def run_process(name, arguments, cwd, env):
    """The same in a process of its own."""
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def prepare(name, *options, cwd, code=0, env=None):
    """Run data/NAME/prepare.py from the folder `cwd`, and check its exit code and its messages. env: further variables,
    for a process of its own."""
    arguments = [str(option) for option in options]
    done = run_here(name, arguments, cwd) if env is None else run_process(name, arguments, cwd, env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert len([line for line in done.stderr.splitlines() if line.startswith("prepare.py: ")]) == 1, done.stderr
    return done


def load(folder):
    """(meta, {name of a .bin without the suffix: array}) of a finished folder, every count and digest checked."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {}
    for name, split in meta["splits"].items():
        file = folder / f"{name}.bin"
        tokens = arrays[name] = np.fromfile(file, np.dtype(meta["dtype"]).newbyteorder("<"))
        assert len(tokens) == split["tokens"] and split["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert len(tokens) == 0 or tokens.max() < meta["vocab_size"]
        if meta["kind"] == "classify":
            offsets = arrays[name + ".offsets"] = np.fromfile(folder / f"{name}.offsets.bin", "<i8")
            assert offsets[0] == 0 and offsets[-1] == len(tokens) and len(offsets) == split["documents"] + 1
            assert (np.diff(offsets) > 0).all()
        if meta["kind"] == "classify" and name != "unsup":
            arrays[name + ".labels"] = np.fromfile(folder / f"{name}.labels.bin", np.uint8)
            assert len(arrays[name + ".labels"]) == split["documents"]
    expected = {f"{name}.bin" for name in arrays} | {"meta.json"}
    assert {file.name for file in folder.iterdir()} == expected
    return meta, arrays


def untouched(folder):
    """Nothing at `folder`, and nothing temporary beside it."""
    return not folder.exists() and not list(folder.parent.glob(f"{folder.name}*"))


def add(tar, name, data, **more):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def pack(files, path):
    """{name: bytes} as what the path's suffix says: a zip, a tar, or a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif ".tar" in path.name:
        how = path.suffix[1:] if path.suffix != ".tar" else ""
        with tarfile.open(path, f"w:{how}") as archive:
            for name, data in files.items():
                add(archive, name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def wrap(data, path, inner="input.txt"):
    if path.name.endswith((".tar", ".tar.gz", ".zip")) or not path.suffix:
        return pack({inner: data}, path)
    opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix, open)
    with opener(path, "wb") as f:
        f.write(data)
    return path
