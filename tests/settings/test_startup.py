"""Scripts set OpenMP's spin count before they import torch; a missing package ends in one line."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core import startup
from core.config import missing_package
from helpers import ROOT

SCRIPTS = ("train.py", "sample.py", "compare.py", "bench.py", "bench_load.py", "bench_pruning.py", "plot.py", "app.py",
           "convert.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_imported_first(script):
    body = ast.parse((ROOT / script).read_text("utf-8")).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [alias.name for alias in imports[0].names] == ["startup"]


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what PyTorch has on Linux")
@pytest.mark.parametrize("given, spin_count", [
    ({}, str(startup.SPIN_COUNT)), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_libgomp_takes_it(given, spin_count):
    """OMP_DISPLAY_ENV lets libgomp print its settings when it is loaded."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= given | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, ROOT / "sample.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [spin_count]


# ---- missing packages --------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "sample.py", "compare.py", "bench.py", "data/toy/prepare.py",
                                    "data/enwik8/prepare.py", "data/imdb/prepare.py", "data/stdlib/prepare.py"])
def test_without_packages(script, tmp_path):
    """-S: the packages that are installed are not found, as with a python beside .venv."""
    done = subprocess.run([sys.executable, "-S", ROOT / script], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    line = rf"{Path(script).name}: (torch|numpy) is not installed( for .*: use |: .* -m pip install -r ).*"
    assert re.match(line, done.stderr), done.stderr


def test_a_mistake_in_an_import_keeps_its_traceback(tmp_path):
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom core import startup\nimport no_such\n"
    (tmp_path / "x.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "x.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "x.py\", line 4" in done.stderr and "No module named 'no_such'" in done.stderr


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that stands for the repository, with its requirements files."""
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr("core.config.ROOT", tmp_path)
    return tmp_path


def line(name):
    return missing_package(ModuleNotFoundError("No module", name=name))


def test_the_command_that_installs_it_here(repository):
    pip = f"{sys.executable} -m pip install"
    assert line("torch.nn") == f"torch is not installed: {pip} -r {repository / 'requirements.txt'}"
    for name in ("matplotlib", "streamlit.testing"):
        package = name.partition(".")[0]
        assert line(name) == f"{package} is not installed: {pip} -r {repository / 'requirements-demo.txt'}"
    assert line("rustbpe").endswith(f"{pip} -r {repository / 'requirements-test.txt'}")
    for name in ("wandb", "tor", "t.rch", "mat"):
        assert line(name) == f"{name.partition('.')[0]} is not installed: {pip} {name.partition('.')[0]}"
    assert missing_package(ModuleNotFoundError("no name")).startswith("no name is not installed")


def test_another_python_than_that_of_make(repository, monkeypatch):
    """Where `make train` has made .venv, its python is named."""
    python = repository / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert line("torch") == f"torch is not installed for {sys.executable}: use {python}"
    assert line("matplotlib") == \
        f"matplotlib is not installed: {python} -m pip install -r {repository / 'requirements-demo.txt'}"
    assert line("wandb") == f"wandb is not installed: {sys.executable} -m pip install wandb"
    monkeypatch.setattr(sys, "prefix", str(repository / ".venv"))
    pip = f"{sys.executable} -m pip install"
    assert line("torch") == f"torch is not installed: {pip} -r {repository / 'requirements.txt'}"
