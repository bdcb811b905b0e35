"""Checkpoints: files that are replaced atomically, that carry their own digest, and that run no code when they are
read.

A checkpoint is a dict of tensors and plain values in one file that ends in its sha256. For a sharded model
(`dist.shard`) see shards.py.
"""

import math
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import torch

from core import dist, foreign, hardware
from core.config import UserError, check_choice, convert
from core.meta import check_meta
from core.optimizers import as_tensors, check_tensor, optimizer_state, restore_optimizer
from core.readers import COUNT, check_regular, expect, flag, listing, mapping, number, plain, record, text, optional_record
from core.runs import digest, write_whole
from core.shards import check_shards, drop_shards, read_shards, shard_entries, write_shards

PREVIOUS = "ckpt-previous.pt"  # the save before the last one
SEAL = b"\nsha256 "  # follows the zip file of torch.save; then comes the digest of all before it


def save(path, checkpoint, keep=None):
    """Write tensors and plain values atomically. keep: see `write_whole`. Raises SaveError."""

    def write(file):
        torch.save({**checkpoint, "sealed": True}, file)
        seal = SEAL + digest(file).encode()
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
        if sealed and digest(file, size).encode() != end[len(SEAL) :]:
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


# ---- what a checkpoint holds ------------------------------------------------------------------

FIELD = {bool: flag, int: number(0, 2**31, whole=True), float: number(), str: text(), dict: mapping(plain, 1000)}
PLAIN_ENTRIES = optional_record({"settings": mapping(plain, 1000), "device": text(), "dtype": text()})
STATE = optional_record({"step": COUNT, "evaluated": number(-1, 1e15, whole=True), "best": number(-math.inf, math.inf),
                     "best_step": COUNT, "worse": COUNT, "seconds": number(0), "work": number(0)})


def check_sizes(config, shapes):
    """Raise ValueError if a model of this config cannot have weights of these shapes, {name: shape}. Called before the
    model is built, which could take all memory, or hours."""
    C, count = config.n_embd, sum(map(math.prod, shapes.values()))
    expect(config.n_layer <= len(shapes), f"at most {len(shapes)}, the number of tensors", config.n_layer, "n_layer")
    for name, rows in (("embedding.weight", config.vocab_size), ("positions.weight", config.block_size),
                       ("head.weight", config.n_class or config.vocab_size)):
        if name in shapes:
            columns = shapes[name][1:] if name == "head.weight" else (C,)
            fits = shapes[name][:1] >= (rows,) and shapes[name][1:] == columns  # an edited model may have more rows
            expect(fits, f"the shape {(rows, *columns)}", shapes[name], name)
    expect(config.vocab_size * C <= 16 * count, f"an embedding that fits {count:,} weights", config.vocab_size, "vocab_size")
    width = C if config.model == "gpt" else config.options.get("hidden", 1)
    expect(8 * width**2 * config.n_layer <= count, f"layers that fit {count:,} weights", width, "n_embd or hidden")


def check_meta_of(checkpoint, config):
    """Raise ValueError or UserError unless the data's meta.json in a checkpoint is valid and fits its config."""
    meta = checkpoint["meta"]
    try:
        check_meta(meta, "its meta")
    except UserError as error:
        raise UserError(f"it has no tokenizer that is known here ({error})")
    expect(meta["vocab_size"] == config.vocab_size, config.vocab_size, meta["vocab_size"], "vocab_size of its meta")
    if config.n_class:
        record({"classes": listing(text(), config.n_class)})(meta, "its meta")
        expect(len(meta["classes"]) == config.n_class, f"{config.n_class} classes", meta["classes"], "its meta")


def checked_config(path, checkpoint, config_class):
    """(its config, {name: shape} of the weights) of a checkpoint. Raises ValueError or UserError unless the types and
    ranges of model_config, meta, settings and weights are right and their sizes fit one another."""
    kinds = optional_record({f.name: FIELD.get(f.type, plain) for f in fields(config_class)})
    record({"model_config": kinds})(checkpoint, "the checkpoint")
    PLAIN_ENTRIES(checkpoint, "the checkpoint")
    if removed := checkpoint["model_config"].keys() - {f.name for f in fields(config_class)}:
        raise ModelEdited(f"{path} has {names(removed)} in its model_config, which {config_class.__name__} lacks")
    config = config_class(**checkpoint["model_config"])
    config.check()
    defaults = config.default_options()
    for key in config.options:
        check_choice(f"option of {config.attention}", key, defaults)
        convert(key, config.options[key], defaults[key], "options")
    if "shards" in checkpoint:
        check_shards(path, checkpoint["shards"])
        entries = shard_entries(path, checkpoint["shards"])
        shapes = {name: tuple(entries[f"model.{name}"].size) for name in checkpoint["shards"]["names"]}
    else:
        record({"model": record({})})(checkpoint, "the checkpoint")
        for name, tensor in checkpoint["model"].items():
            check_tensor(name, tensor, None)
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["model"].items()}
    check_sizes(config, shapes)
    if "meta" in checkpoint:
        check_meta_of(checkpoint, config)
    return config, shapes


class ModelEdited(UserError):
    """A checkpoint is whole, but the code no longer describes its model."""

    def __init__(self, difference):
        self.difference = difference
        super().__init__(f"{difference}: the model was edited after this training; undo the edit, or train again")


def names(keys, most=3):
    """Up to `most` names in words."""
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def check_fit(path, shapes, model_shapes, options):
    """Raise UserError unless a checkpoint's weights are those of the model that was built, both as {name: shape}.

    options: those that were given in place of the checkpoint's.
    """
    unlike = model_shapes.keys() ^ shapes.keys()
    if options and unlike:
        raise UserError(f"the weights in {path} are of another model than {options} makes (they differ in "
                        f"{min(unlike)}); such an option is chosen before training")
    if unlike:
        sides = (("only the file has", shapes.keys() - model_shapes.keys()),
                 ("only the model has", model_shapes.keys() - shapes.keys()))
        raise ModelEdited(f"the weights in {path} are not those of the model as it is built now ("
                          + "; ".join(f"{words} {names(keys)}" for words, keys in sides if keys) + ")")
    for name, shape in model_shapes.items():
        if shapes[name] != shape:
            raise ModelEdited(f"the weight {name} in {path} has the shape {shapes[name]}, in the model as built now {shape}")


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
    for name, weight in state.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
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


def load(path, config_class, build, device="cpu", options=None, **changes):
    """(model in evaluation mode, checkpoint) from a file that `train.py` wrote.

    config_class: of the model's configuration, as model.GPTConfig; build: makes the model of a configuration.
    changes: fields of the configuration to replace (kernel, dropout); options: the same for its mechanism's options.
    Raises UserError if the file is missing, damaged or no checkpoint, or if its weights do not fit or are not finite.
    """
    path = Path(path)
    try:
        checkpoint, config, shapes = read(path, config_class, device)
        given = {key: value for key, value in (options or {}).items() if config.options.get(key, value) != value}
        config = replace(config, **changes, options={**config.options, **given})
        model = build_with_weights(path, checkpoint, config, shapes, build, given)
    except FileNotFoundError as error:
        if path.exists():
            raise UserError(f"{path} is damaged: {error.filename} beside it is missing; {beside(path)}")
        raise UserError(f"no checkpoint at {path}; {foreign.explain_missing(path)}")
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({reason}); {beside(path)}")
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
        raise UserError(f"{path} is damaged ({error}); take it away to go on without it: the best weights are then counted "
                        "from here on")


def restore(path, checkpoint, state, model, optimizer, seed, device, dtype):
    """Restore everything but the weights, which are loaded already, from the checkpoint at `path`: `state` and
    `optimizer` in place, the random stream. Prints what differs. Raises UserError if the checkpoint's state is of
    another model."""
    for name, now in (("device", device.split(":")[0]), ("dtype", dtype)):
        if checkpoint.get(name, now) != now:
            print(f"checkpoint: {name} was {checkpoint[name]!r}, is now {now!r}: the losses from here on differ by rounding, "
                  "and with dropout by its random stream, from those of an unbroken run")
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
            print(f"checkpoint: ranks were {before}, are now {dist.world}: the same texts a step, dropout from new random "
                  "streams")
            dist.seed(seed, state["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} holds weights that fit and a state of the optimiser that does not ({error}); "
                        "put the right file back, or the configure_optimizer that it was trained with")
