"""Fixtures of the tests of runs and faults."""

import shutil
import subprocess
from pathlib import Path

import pytest
from fault_runs import unbroken_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory, text):
    """The unbroken run."""
    return unbroken_run(tmp_path_factory.mktemp("whole"), text)


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


@pytest.fixture
def data(text, tmp_path):
    """A copy of the data that may be spoiled."""
    return Path(shutil.copytree(text, tmp_path / "data"))
