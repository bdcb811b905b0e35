"""What nanoGPT writes: checkpoints (ckpt.pt), and data (train.bin, val.bin, and meta.pkl with the characters)."""

import importlib.util
import pickle
import pickletools
import re
import sys
from pathlib import Path

import numpy as np
import torch

from core import gpt2, prepare
from core.checkpoint import check_whole
from core.config import PLAIN, UserError, one_line
from core.dataset import cut
from core.meta import check
from core.readers import expect, flag, number, read_bytes, record
from core.tokenizer import Tokenizer

# ---- checkpoints -------------------------------------------------------------------------------

SIZE = number(1, 2**31, whole=True)
MODEL_ARGS = record(dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), SIZE),
                    {"bias": flag, "dropout": number(0, 1)})
ENTRIES = {"model": record({}), "model_args": MODEL_ARGS, "iter_num": number(0, 1e15, whole=True), "config": record({})}


def read_checkpoint(path):
    """A checkpoint of nanoGPT as one of core/checkpoint.py, without meta.

    Raises UserError if it is damaged, is none, or asks for code.
    """
    try:
        if check_whole(path):
            raise UserError(f"{path} is a checkpoint of train.py already; export it with --to=FILE.safetensors")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        record(ENTRIES)(saved, "it")
        weights = gpt2.rename(saved["model"])
        shape = {key: saved["model_args"][key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        config, weights = gpt2.model_of(weights, {**shape, "dropout": float(saved["model_args"].get("dropout", 0))})
        loss = float(saved["best_val_loss"]) if "best_val_loss" in saved else float("inf")
        step, optimizer = saved["iter_num"], optimizer_state(saved, weights)
    except (UserError, OSError):
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(f"{path} asks for code ({asked[1] if asked else one_line(error, 100)}), which is not run: "
                        "expected a checkpoint of nanoGPT, with tensors and plain values alone")
    except Exception as error:  # whatever a damaged or forged file leads to
        raise UserError(f"{path} is damaged or no checkpoint of nanoGPT ({one_line(error, 200)})")
    best = loss if loss < 1e9 else float("inf")  # nanoGPT begins with 1e9; NaN, too, is no score
    state = {"step": step, "evaluated": step, "best": best, "best_step": step, "worse": 0, "seconds": 0.0, "work": 0.0}
    settings = {key: value for key, value in saved["config"].items() if type(value) in PLAIN}
    return {"model_config": config, "model": weights, "settings": settings, "state": state, "optimizer": optimizer}


def optimizer_state(saved, weights):
    """{name in model.py: {key: tensor}} of AdamW's state in nanoGPT's checkpoint (dict); None if it holds another one.

    nanoGPT numbers the weights in the order of the model, matrices first, then vectors, without the tied head.
    weights: {name in model.py: tensor}.
    """
    state = saved.get("optimizer", {}).get("state", {})
    names = [name for name in weights if name != "head.weight"]
    names = [name for is_matrix in (True, False) for name in names if (weights[name].dim() > 1) == is_matrix]
    if state.keys() != set(range(len(names))):
        return None
    named = {}
    for n, name in enumerate(names):
        values = {key: state[n].get(key) for key in ("step", "exp_avg", "exp_avg_sq")}
        if not all(torch.is_tensor(value) for value in values.values()):
            return None
        for key in ("exp_avg", "exp_avg_sq"):
            values[key] = gpt2.cut_rows({name: values[key]})[name]
            if values[key].shape != weights[name].shape:
                return None
        named[name] = values
    return named


def import_model(folder):
    """The module model.py of a clone of nanoGPT. Raises UserError if there is none."""
    path = Path(folder) / "model.py"
    if not path.exists():
        raise UserError(f"peer expects the folder of a nanoGPT clone, with its model.py; got {folder!r}")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    sys.modules["nanogpt_model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- data --------------------------------------------------------------------------------------

LITERALS = {"PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
            "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "INT", "BININT",
            "BININT1", "BININT2", "LONG", "LONG1"}  # opcodes that make dicts, texts and integers


def read_characters(path):
    """The characters of nanoGPT's meta.pkl, a list in order of their ids.

    A pickle is a program. This one is unpickled only if it consists of instructions that make dicts, texts and
    integers. Raises UserError for any other.
    """
    data = read_bytes(path)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in LITERALS:
                raise UserError(f"{path} asks for more than dicts, texts and integers ({opcode.name}), which is not "
                                "run: expected the meta.pkl of nanoGPT")
            if opcode.name.endswith("PUT"):  # an index of the memo, for which unpickling makes room
                expect(argument < len(data), f"below {len(data)}", argument, opcode.name)
        itos = pickle.loads(data)["itos"]
        expect(type(itos) is dict and itos.keys() == set(range(len(itos))), "characters by number as itos", itos)
        vocab = [itos[n] for n in range(len(itos))]
        check({"tokenizer": "chars", "vocab_size": len(vocab), "mark": None, "vocab": vocab})
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or forged file leads to
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise UserError(f"{path} is damaged or no meta.pkl of nanoGPT ({reason})")
    return vocab


def tokenizer_meta(vocab_size, characters, mark=False):
    """The entries of a meta.json that describe a tokenizer: the characters of a meta.pkl, or GPT-2's tokens.

    vocab_size: the model's, or None: any. characters: the path of the meta.pkl, or ''. mark: whether a document mark
    begins each text (with GPT-2's tokens). Raises UserError if the vocabulary has another size.
    """
    if characters:
        vocab = read_characters(characters)
        if vocab_size not in (None, len(vocab)):
            raise UserError(f"{characters} holds {len(vocab):,} characters, expected {vocab_size:,}, the vocabulary "
                            "of the model: give the meta.pkl of the data that it was trained on")
        return {"tokenizer": "chars", "vocab_size": len(vocab), "mark": None, "vocab": vocab}
    if vocab_size != gpt2.VOCABULARY:
        raise UserError(f"the model's vocabulary has {vocab_size:,} tokens, GPT-2's {gpt2.VOCABULARY:,}: give the "
                        "characters that they stand for with --meta=meta.pkl, which nanoGPT writes beside its data")
    return {"tokenizer": "gpt2", "vocab_size": vocab_size, "mark": vocab_size - 1 if mark else None}


def convert_data(folder, out_dir, characters):
    """Write nanoGPT's data folder as a prepared folder. characters: the path of its meta.pkl, or '': GPT-2's tokens.

    Raises UserError for a missing or damaged file, ConnectionError if GPT-2's vocabulary cannot be loaded.
    """
    meta = tokenizer_meta(None if characters else gpt2.VOCABULARY, characters)
    tokenizer = Tokenizer(meta)
    sizes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])  # bytes of each token
    sizes[gpt2.VOCABULARY - 1 :] = 1  # the document mark
    splits = {name: read_tokens(folder / f"{name}.bin", sizes) for name in ("train", "val")}
    if max([split.pop("largest") for split in splits.values()]) == gpt2.VOCABULARY - 1:
        meta["mark"] = gpt2.VOCABULARY - 1
    source = {"file": folder.resolve().name, "bytes": sum(2 * len(split["tokens"]) for split in splits.values())}
    prepare.write(out_dir, {"name": out_dir.resolve().name, "kind": "lm", **meta, "lossless": True, "partial": False,
                            "options": {}, "source": source, "split_rule": "as nanoGPT made it"}, splits)


def read_tokens(path, sizes):
    """The tokens of a file of nanoGPT as a split of `prepare.write`, and the largest id. sizes: bytes of each token."""
    size = path.stat().st_size if path.is_file() else 0
    if size < 4 or size % 2:
        raise UserError(f"{path}: expected two tokens or more, of two bytes each, found {size:,} bytes; make it again "
                        "with nanoGPT's prepare.py")
    tokens, split = np.memmap(path, "<u2", "r"), {"bytes": 0, "largest": 0}
    for piece in cut(tokens, 1 << 24):
        split["largest"] = max(split["largest"], int(piece.max()))
        if split["largest"] >= len(sizes):
            raise UserError(f"{path} holds the token {split['largest']}, expected ids below {len(sizes):,}, the "
                            "vocabulary: give the meta.pkl of this data with --meta")
        split["bytes"] += int(sizes[piece].sum())
    return {"tokens": tokens, **split}
