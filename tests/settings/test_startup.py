"""The scripts set OpenMP's spin count before torch is loaded, unless the user has."""

import ast
import os
import re
import subprocess
import sys

import pytest

from core import startup
from helpers import ROOT

SCRIPTS = ("train.py", "sample.py", "compare.py", "bench.py", "bench_load.py", "plot.py", "app.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_imported_first(script):
    imports = [node for node in ast.parse((ROOT / script).read_text("utf-8")).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [alias.name for alias in imports[0].names] == ["startup"]


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what PyTorch has on Linux")
@pytest.mark.parametrize("given, spin_count", [
    ({}, str(startup.SPIN_COUNT)), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_libgomp_takes_it(given, spin_count):
    """OMP_DISPLAY_ENV lets libgomp print its settings when it is loaded."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, ROOT / "sample.py", "--help"], env=environment | given | {"OMP_DISPLAY_ENV": "verbose"},
                           capture_output=True, text=True, check=True).stderr
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", shown) == [spin_count]
