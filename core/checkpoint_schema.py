"""What a checkpoint holds: types, ranges and sizes of its entries, checked before a model is built from them."""

import math
from dataclasses import fields

from core.config import UserError, check_choice, convert
from core.meta import check_meta
from core.optimizers import check_tensor
from core.readers import COUNT, checker, expect, flag, listing, mapping, number, optional_record, plain, record, text
from core.shards import check_shards, shard_entries

TOKEN = checker(lambda value: value is None or type(value) is int and 0 <= value < 2**31, "a token or null")
FIELD = {bool: flag, int: number(0, 2**31, whole=True), float: number(), str: text(), dict: mapping(plain, 1000),
         int | None: TOKEN}
PLAIN_ENTRIES = optional_record({"settings": mapping(plain, 1000), "device": text(), "dtype": text(),
                                 "warm_start": mapping(plain, 10)})
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
    for n in range(config.ngram - 1):
        name, table = f"ngrams.tables.{n}.weight", (config.ngram_rows, config.ngram_dim)
        expect(shapes.get(name) == table, f"the shape {table}", shapes.get(name), name)
    expect(config.vocab_size * C <= 16 * count, f"an embedding that fits {count:,} weights", config.vocab_size,
           "vocab_size")
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
            raise ModelEdited(f"the weight {name} in {path} has the shape {shapes[name]}, in the model as built now "
                              f"{shape}")


def check_finite(weights):
    """Raise ValueError for a weight of {name: tensor} that is not finite."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
