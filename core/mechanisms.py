"""Models and attention mechanisms by name: --attention=NAME is the class `Attention` of NAME.py beside attention.py."""

import importlib

from core.config import check_choice, mechanism_files, plain_values

MODELS = {"gpt": ("model", "GPT"), "bilstm": ("bilstm", "BiLSTM")}  # name: (module, class)


def mechanisms():
    """The names of the attention mechanisms beside attention.py."""
    return ["dense"] + [name for name in mechanism_files() if name != "attention"]


def mechanism(name):
    """(class, default options) of the attention mechanism `name`: of NAME.py, or of attention.py for dense.

    The options are the plain lower-case values at the top of the file. Raises UserError for an unknown name.
    """
    check_choice("attention", name, mechanisms())
    module = importlib.import_module("attention" if name == "dense" else name)
    return module.Attention, plain_values(vars(module))


def options_of(model, attention):
    """The default options, by name, of a kind of model with a mechanism. Raises UserError for an unknown name."""
    check_choice("model", model, MODELS)
    return mechanism(attention)[1] if model == "gpt" else importlib.import_module(model).options_of(attention)


def new_model(config):
    """The model that a GPTConfig describes. Raises UserError for an invalid configuration."""
    check_choice("model", config.model, MODELS)
    module, name = MODELS[config.model]
    return getattr(importlib.import_module(module), name)(config)
