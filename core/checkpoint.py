"""Checkpoints: files that are replaced atomically, that carry their own digest, and that run no code when they are
read.

A checkpoint is a dict of tensors and plain values in one file that ends in its sha256. For a sharded model
(`dist.shard`) see shards.py.
"""

import contextlib
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

from core import dist, foreign, hardware
from core.checkpoint_schema import STATE, ModelEdited, check_finite, check_fit, checked_config
from core.config import UserError
from core.meta import digest_of_start
from core.optimizers import as_tensors, optimizer_state, restore_optimizer
from core.readers import check_regular, expect, listing, mapping, number, record
from core.runs import write_whole
from core.shards import drop_shards, read_shards, write_shards

PREVIOUS = "ckpt-previous.pt"  # the save before the last one
SEAL = b"\nsha256 "  # follows the zip file of torch.save; then comes the digest of all before it


def save(path, checkpoint, keep=None):
    """Write tensors and plain values atomically. keep: see `write_whole`. Raises SaveError."""

    def write(file):
        torch.save({**checkpoint, "sealed": True}, file)
        seal = SEAL + digest_of_start(file, file.seek(0, 2)).encode()
        file.seek(0, 2)
        file.write(seal)

    write_whole(Path(path), write, keep)


def save_all(path, meta, model, optimizer=None, keep=None):
    """Write a model, the state of its optimiser (None: without) and plain values `meta`; called by every rank.

    Raises SaveError on every rank if the system refuses it on one.
    """
    parts = {"model": model.state_dict()}
    if optimizer:
        parts["optimizer"] = optimizer_state(model, optimizer)
    if dist.is_sharded(model):
        parts |= {"optimizer": as_tensors(parts["optimizer"])} if optimizer else {}
        parts = {"shards": write_shards(path, parts)}
    dist.on_rank0(save, path, {**meta, **parts}, keep)
    dist.on_rank0(drop_shards, path.parent, ("ckpt.pt", PREVIOUS, "best.pt"))


def check_whole(path):
    """Raise ValueError unless a checkpoint is as written, to the bit; UserError if it is no regular file.
    Returns whether it has a digest: those of earlier versions have none, but a checksum of each part."""
    check_regular(path)
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - len(SEAL) - 64))
        size, end = file.tell(), file.read()
        sealed = end.startswith(SEAL)
        if sealed and digest_of_start(file, size).encode() != end[len(SEAL) :]:
            raise ValueError("it is not what was written, by its digest")
        if not sealed and end[-22:-18] != b"PK\5\6":
            raise ValueError("its end is missing, or it is no checkpoint")
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type for part in archive.infolist()):  # it may expand to more than the memory
                raise ValueError("a part of it is not what was written, but packed")
            if not sealed and archive.testzip():
                raise ValueError("a part of it is not what was written, by its checksum")
    return sealed


def beside(path):
    """What to do about a damaged checkpoint: which others in its folder are whole."""
    whole = []
    for name in ("ckpt.pt", PREVIOUS, "best.pt"):
        try:
            if name != path.name:
                check_whole(path.with_name(name))
                whole.append(name)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, UserError):
            pass
    if path.name == "ckpt.pt" and PREVIOUS in whole:
        return f"the save before it is whole: rename {PREVIOUS} to ckpt.pt to go on from there"
    if whole:
        return f"whole beside it: {' and '.join(whole)}"
    return "no other beside it is whole: train again"


# ---- reading ------------------------------------------------------------------------------------


def build_with_weights(path, checkpoint, config, shapes, build, given):
    """The model of a config with a checkpoint's weights. given: see `check_fit`. Raises UserError or ValueError."""
    with torch.random.fork_rng(devices=[]):  # initial weights are replaced: the run's random stream stays
        model = build(config)
    state = model.state_dict()
    check_fit(path, shapes, {name: tuple(weight.shape) for name, weight in state.items()}, given)
    if "shards" in checkpoint:
        read_shards(path, checkpoint["shards"], {"model": state})
    else:
        model.load_state_dict(checkpoint["model"])
    check_finite(state)
    return model


def read(path, config_class, device):
    """(checkpoint, its config, {name: shape} of its weights). Raises what `load` explains."""
    sealed = check_whole(path)
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    if checkpoint.get("sealed") and not sealed:
        raise ValueError("its end is missing")
    if explanation := foreign.explain_checkpoint(path, checkpoint):
        raise UserError(explanation)
    try:
        return checkpoint, *checked_config(path, checkpoint, config_class)
    except ModelEdited:
        raise
    except UserError as error:
        raise ValueError(error)


@contextlib.contextmanager
def explained(path):
    """Turn an error of reading the checkpoint at `path` into a UserError: the file is missing, damaged or foreign."""
    try:
        yield
    except FileNotFoundError as error:
        if path.exists():
            raise UserError(f"{path} is damaged: {error.filename} beside it is missing; {beside(path)}")
        raise UserError(f"no checkpoint at {path}; {foreign.explain_missing(path)}")
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({reason}); {beside(path)}")


def load(path, config_class, build, device="cpu", options=None, **changes):
    """(model in evaluation mode, checkpoint) from a file that `train.py` wrote.

    config_class: of the model's configuration, as model.GPTConfig; build: makes the model of a configuration.
    changes: fields of the configuration to replace (kernel, dropout); options: the same for its mechanism's options.
    Raises UserError if the file is missing, damaged or no checkpoint, or if its weights do not fit or are not finite.
    """
    path = Path(path)
    with explained(path):
        checkpoint, config, shapes = read(path, config_class, device)
        given = {key: value for key, value in (options or {}).items() if config.options.get(key, value) != value}
        config = replace(config, **changes, options={**config.options, **given})
        model = build_with_weights(path, checkpoint, config, shapes, build, given)
    return model.to(device).eval(), checkpoint


def check_best(path, state):
    """Raise UserError for a damaged best.pt before the training; if it is missing, count the best score from here
    on."""
    try:
        check_whole(path)
    except FileNotFoundError:
        if state["best"] < math.inf:
            print(f"{path} is missing: the best weights are counted from here on")
            state.update(best=math.inf, evaluated=-1)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); take it away to go on without it: the best weights are then "
                        "counted from here on")


def restore(path, checkpoint, state, model, optimizer, seed, device, dtype):
    """Restore everything but the weights, which are loaded already, from the checkpoint at `path`: `state` and
    `optimizer` in place, the random stream. Prints what differs. Raises UserError if the checkpoint's state is of
    another model."""
    for name, now in (("device", device.split(":")[0]), ("dtype", dtype)):
        if checkpoint.get(name, now) != now:
            print(f"checkpoint: {name} was {checkpoint[name]!r}, is now {now!r}: the losses from here on differ by "
                  "rounding, and with dropout by its random stream, from those of an unbroken run")
    kinds = {"state": STATE, "random": listing(record({}), 2**20)}
    try:
        # earlier versions: float16's scaler
        record(kinds, {"scaler": mapping(number(0, math.inf), 10)})(checkpoint, "it")
        expect(checkpoint["random"], "the random stream of a rank at least", checkpoint["random"], "random")
        state |= checkpoint["state"]
        restore_optimizer(path, checkpoint, model, optimizer)
        torch.manual_seed(seed)  # of a device that the checkpoint has no random stream of
        if (before := len(checkpoint["random"])) == dist.world:
            hardware.set_random_state(device, checkpoint["random"][dist.rank])
        else:
            print(f"checkpoint: ranks were {before}, are now {dist.world}: the same texts a step, dropout from new "
                  "random streams")
            dist.seed(seed, state["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} holds weights that fit and a state of the optimiser that does not ({error}); "
                        "put the right file back, or the configure_optimizer that it was trained with")
