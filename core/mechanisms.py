"""Attention mechanisms by name: --attention=NAME is the class `Attention` of NAME.py beside attention.py."""

import importlib

from core.config import check_choice, mechanism_files, plain_values


def mechanisms():
    """The names of the attention mechanisms beside attention.py."""
    return ["dense"] + [name for name in mechanism_files() if name != "attention"]


def mechanism(name):
    """(class, default options) of the attention mechanism `name`: of `name`.py, or dense.

    The options are the plain lower-case values at the top of the file. Raises UserError for a
    name that is none of the mechanisms beside attention.py.
    """
    check_choice("attention", name, mechanisms())
    module = importlib.import_module("attention" if name == "dense" else name)
    return module.Attention, plain_values(vars(module))
