"""Fixtures of the tests of training."""

import shutil
import sys

import pytest
import torch
from mechanism_files import FILES, MY_ATTENTION

import train
from core.dataset import batches
from helpers import ROOT


@pytest.fixture(params=["text", "reviews"])
def folder(request):
    """The data of a language model and of a classifier."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def at_batch(monkeypatch):
    """A function: do something when training asks for its batch `number`; evaluation's batches do not count."""

    def arrange(number, action):
        def make(*arguments):
            source = batches(*arguments)
            if arguments[1] == "train":
                ask = source.batch
                source.batch = lambda n, *part: (n == number and action(), ask(n, *part))[1]
            return source

        monkeypatch.setattr(train, "batches", make)

    return arrange


@pytest.fixture
def asked(monkeypatch):
    """The models that torch.compile was asked for. It wraps them as ever, without the minutes of a C++ compiler."""
    asked, eager = [], torch._dynamo.optimize("eager")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda model: asked.append(model) or eager(model))
    torch._dynamo.reset()
    return asked


@pytest.fixture
def beside(tmp_path_factory, monkeypatch):
    """The folder of model.py as model.py sees it: the mechanisms of the repository, and my_attention.py."""
    folder = tmp_path_factory.mktemp("beside")
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "my_attention.py").write_text(MY_ATTENTION)
    monkeypatch.setattr("core.config.ROOT", folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])  # after the repository, whose own modules stay its own
    yield folder
    sys.modules.pop("my_attention", None)
