"""Warm start: a new run that begins with the weights of another one, --init_from=FOLDER_OR_FILE.

Weights are taken by name. Model settings and options that are not given are the source's. New are: a mechanism's
parameters if the attention is another one, the head if the classes are, layers that the source lacks, and the rows of
tokens and positions that it lacks. The optimiser, the data and all other settings are those of the new run.
"""

import os
import re
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from core.checkpoint import explained, read
from core.checkpoint_schema import STATE, check_finite
from core.config import UserError, did_you_mean
from core.figures import ranges
from core.model_config import OF_THE_RUN
from core.readers import optional_record, record
from core.shards import read_shards, sha256
from core.tokenizer import Tokenizer

NAMES = ("scratch", "resume", "auto")  # the other values of init_from
PART_OF_ATTENTION = re.compile(r"\battention\.(\w+)")  # in names of weights
PROJECTIONS = ("qkv", "proj")  # which every mechanism has
TOKENIZER = ("tokenizer", "vocab_size", "mark", "vocab", "pattern", "ranks")  # entries of a meta.json


def check_init_from(value):
    """Raise UserError unless init_from is one of NAMES or a path that exists."""
    if value not in NAMES and not os.path.exists(value):
        raise UserError(f"unknown init_from {value!r}: no file or folder has this name{did_you_mean(value, NAMES)}")


def checkpoint_of(path):
    """The checkpoint file that init_from names: itself, or a folder's best.pt, or ckpt.pt if there is no best.pt."""
    if not path.is_dir():
        return path
    return path / ("best.pt" if (path / "best.pt").exists() else "ckpt.pt")


def matching_tokens(path, before, now):
    """(ids of the tokens in `now`, ids of the same tokens in `before`), two metas; None if their tokenizers are equal.

    Raises UserError if no token but the document mark and <unk> is in both.
    """
    if all(before.get(key) == now.get(key) for key in TOKENIZER):
        return None
    ids = {key: i for i, key in enumerate(Tokenizer(before).token_keys())}
    pairs = [(i, ids[key], key) for i, key in enumerate(Tokenizer(now).token_keys()) if key in ids]
    if not any(isinstance(key, bytes) for _, _, key in pairs):
        raise UserError(f"{path} has {before['vocab_size']} {before['tokenizer']} as tokens, and none of them is among "
                        f"the {now['vocab_size']} {now['tokenizer']} of the data: prepare the data with another "
                        "tokenizer, or train from scratch")
    return [new for new, _, _ in pairs], [old for _, old, _ in pairs]


class WarmStart:
    """The checkpoint that init_from names, if it names one.

    config_class: of the model's configuration, as model.GPTConfig. If init_from names a checkpoint, `path` is its path,
    and `origin` is what config.json and the run's checkpoints hold of it; else they are None and {}.
    """

    def __init__(self, config_class):
        self.config_class, self.path, self.origin = config_class, None, {}

    def inherit(self, settings):
        """The `inherit` of `config.configure`: reads the checkpoint, and returns its model settings and options.

        Raises UserError if it is missing, damaged or no checkpoint of train.py.
        """
        if settings["init_from"] in NAMES or settings["eval_only"]:
            return {}
        check_init_from(settings["init_from"])
        path = checkpoint_of(Path(settings["init_from"]))
        with explained(path):
            checkpoint, self.config, shapes = read(path, self.config_class, "cpu")
            record({"meta": record({})})(checkpoint, "the checkpoint")
            optional_record({"state": STATE})(checkpoint, "the checkpoint")
            self.meta = checkpoint["meta"]
            self.weights = checkpoint.get("model") or {name: torch.empty(shape) for name, shape in shapes.items()}
            if "shards" in checkpoint:
                read_shards(path, checkpoint["shards"], {"model": self.weights})
            check_finite(self.weights)
            step = checkpoint.get("state", {}).get("step", 0)
            self.origin = {"warm_start": {"path": str(path.resolve()), "sha256": sha256(path), "step": step}}
        self.path, self.before = path, settings
        return {key: value for key, value in asdict(self.config).items() if key not in OF_THE_RUN} | self.config.options

    @torch.no_grad()
    def copy_into(self, model, meta):
        """Copy the weights into a new model on the CPU, which has the vocabulary of a meta.json, and print what was
        taken. Raises UserError if the widths differ or nothing fits."""
        self.check(model.config)
        tokens = matching_tokens(self.path, self.meta, meta)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = names - dict(model.named_parameters()).keys()
        taken, new = {}, {}  # {name: elements}
        for name, weight in model.state_dict().items():
            if name in tied:
                continue
            count = self.copy(name, weight, model.config, meta, tokens)
            taken |= {name: count} if count else {}
            new |= {name: weight.numel() - count} if count < weight.numel() else {}
        if not taken:
            raise UserError(f"no weight in {self.path} belongs to a model like this one: train from scratch")
        left = {name: weight.numel() - taken.get(name, 0) for name, weight in self.weights.items()}
        if self.config.tie and self.config.causal:
            left.pop("head.weight", None)  # the embedding under another name
        self.print(model, taken, new, {name: count for name, count in left.items() if count})
        self.weights = None  # frees its memory

    def check(self, config):
        """Raise UserError if the two models differ in a size that all their weights depend on."""
        for key in ("n_embd", "n_head"):
            before, now = getattr(self.config, key), getattr(config, key)
            if before != now and self.config.model == config.model:
                raise UserError(f"{self.path} has {key}={before}, and {key}={now} is given: its weights do not "
                                f"fit; leave {key} out, or train from scratch")

    def copy(self, name, weight, config, meta, tokens):
        """Copy what fits of one weight; returns the number of elements. tokens: from `matching_tokens`."""
        source = self.weights.get(name)
        hashed = tokens and name.startswith("ngrams.tables.")  # rows of n-grams of other tokens
        if source is None or hashed or self.is_other(name, source.shape != weight.shape, config, meta):
            return 0
        rows = None  # (of the weight, of the source); None: all
        if name == "embedding.weight" or name == "head.weight" and config.causal:
            rows = tokens
            if not rows and source.shape != weight.shape:  # of a model with more rows than tokens
                rows = range(meta["vocab_size"]), range(meta["vocab_size"])
        elif name == "positions.weight":
            rows = [range(min(len(source), len(weight)))] * 2
        if source.shape[rows is not None :] != weight.shape[rows is not None :]:
            raise UserError(f"the weight {name} has the shape {tuple(source.shape)} in {self.path} and "
                            f"{tuple(weight.shape)} here: give the settings of that run, or train from scratch")
        if rows is None:
            weight.copy_(source)
            return weight.numel()
        weight[list(rows[0])] = source[list(rows[1])].to(weight.dtype)
        return len(rows[0]) * weight[0].numel()

    def is_other(self, name, reshaped, config, meta):
        """Whether a weight means something else in the source: of a head for other classes, or of another mechanism,
        except for projections of one shape."""
        if name.startswith("head."):
            same = self.config.n_class == config.n_class
            return not same or config.n_class and self.meta.get("classes") != meta.get("classes")
        part = PART_OF_ATTENTION.search(name)
        return part and self.config.attention != config.attention and (reshaped or part[1] not in PROJECTIONS)

    def print(self, model, taken, new, left):
        """Print the settings that the source gave, and the weights in {name: elements} that were taken, new, left."""
        config, options = model.config, model.config.default_options()
        settings = {key: value for key, value in asdict(self.config).items() if self.before.get(key, value) != value
                    and value == getattr(config, key) and key not in OF_THE_RUN}
        settings |= {key: value for key, value in self.config.options.items()
                     if key in options and options[key] != value == config.options[key]}
        origin = self.origin["warm_start"]
        print(f"init_from: {self.path}, step {origin['step']}, sha256 {origin['sha256'][:16]}")
        text = ", ".join(f"{key}={value}" for key, value in settings.items())
        print(f"  its settings: {text or 'as given or by default'}")
        for word, counts, weights in (("taken", taken, model.state_dict()), ("new", new, model.state_dict()),
                                      ("left", left, self.weights)):
            where = " in " * bool(counts) + ", ".join(describe(counts, weights))
            print(f"  {word}: {sum(counts.values()):,} parameters{where}")


def describe(counts, weights):
    """Descriptions of weights in {name: elements}: 'layers.0-3.up' for whole modules, 'N of M rows of embedding' for
    parts. weights: {name: tensor} of the model that they are in."""
    whole = [name for name in counts if counts[name] == weights[name].numel()]
    sizes, described = Counter(prefix for name in weights for prefix in prefixes(name)), defaultdict(dict)
    complete = Counter(prefix for name in whole for prefix in prefixes(name))
    for name in whole:
        module = next(prefix for prefix in prefixes(name) if complete[prefix] == sizes[prefix])
        number = re.search(r"(?<=\.)\d+", module)
        described[re.sub(r"(?<=\.)\d+", "{}", module, count=1)][int(number[0]) if number else 0] = None
    parts = [f"{counts[name] // weights[name][0].numel():,} of {len(weights[name]):,} rows of "
             f"{name.removesuffix('.weight')}" for name in counts if name not in whole]
    return parts + [module.format(ranges(dict.fromkeys(sorted(numbers)))) for module, numbers in described.items()]


def prefixes(name):
    """The modules that hold a weight, from the outermost one, and its own name: ['layers', 'layers.0', ...]."""
    return [name[: dot.start()] for dot in re.finditer(r"\.", name)] + [name]
