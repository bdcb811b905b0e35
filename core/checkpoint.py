"""Checkpoints: files that are at every moment whole, that tell when they are not what was written, and that run no code.

A checkpoint is one file that ends in its own sha256, a dict of tensors and plain values. Of a model that is split over
ranks (`dist.shard`) each rank writes its part, by torch.distributed.checkpoint, into a folder beside that file, which
then holds the parts' digests in the place of weights: any number of ranks can read them again, and a process alone.
"""

import io
import math
import pickle
import shutil
import warnings
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import torch

from core import dist, hardware
from core.config import UserError, check_choice, convert
from core.meta import check_meta
from core.readers import COUNT, check_regular, expect, flag, listing, mapping, number, plain, record, text, optional_record
from core.runs import SaveError, digest, write_whole

PREVIOUS = "ckpt-previous.pt"  # the save before the last one
SEAL = b"\nsha256 "  # after the zip file that torch.save writes, then the digest of all before: torch.load checks none


def save(path, checkpoint, keep=None):
    """Write tensors and plain values so that `path` is at every moment whole: old or new. keep: see `write_whole`."""

    def write(file):
        torch.save({**checkpoint, "sealed": True}, file)
        seal = SEAL + digest(file).encode()
        file.seek(0, 2)
        file.write(seal)

    write_whole(Path(path), write, keep)


def save_all(path, facts, model, optimizer=None, keep=None):
    """Write a model, its optimiser (None: without) and further facts about the run; called by every rank.

    Raises SaveError on every rank where the system refuses it one.
    """
    parts = {"model": model.state_dict()} | ({"optimizer": optimizer_state(model, optimizer)} if optimizer else {})
    if dist.is_sharded(model):
        parts = {"shards": write_shards(path, parts)}
    dist.on_rank0(save, path, {**facts, **parts}, keep)
    dist.on_rank0(drop_shards, path.parent)


def check_whole(path):
    """Raise ValueError unless every bit of a checkpoint is as it was written, UserError where it is no regular file.
    Returns whether it is sealed: those of earlier versions are not, and their parts have checksums."""
    check_regular(path)
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - len(SEAL) - 64))
        size, end = file.tell(), file.read()
        sealed = end.startswith(SEAL)
        if sealed and digest(file, size).encode() != end[len(SEAL) :]:
            raise ValueError("it is not what was written, by its digest")
        if not sealed and end[-22:-18] != b"PK\5\6":
            raise ValueError("its end is missing, or it is none")
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type for part in archive.infolist()):  # unpacked it may be larger than any memory
                raise ValueError("a part of it is not what was written, but packed")
            if not sealed and archive.testzip():
                raise ValueError("a part of it is not what was written, by its checksum")
    return sealed


def beside(path):
    """What to do about a checkpoint that is damaged, by the others in its folder that are whole."""
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
FACTS = optional_record({"settings": mapping(plain, 1000), "device": text(), "dtype": text()})
STATE = optional_record({"step": COUNT, "evaluated": number(-1, 1e15, whole=True), "best": number(-math.inf, math.inf),
                     "best_step": COUNT, "worse": COUNT, "seconds": number(0), "work": number(0)})


def check_tensor(name, tensor, shape, dtype=None):
    """Raise ValueError unless a value of a checkpoint is a whole floating-point tensor, of this shape and dtype unless None."""
    expect(torch.is_tensor(tensor) and tensor.layout == torch.strided, "a tensor", tensor, name)
    expect(tensor.dtype == dtype if dtype else tensor.is_floating_point(), dtype or "floating point", tensor.dtype, name)
    expect(shape is None or tensor.shape == shape, f"the shape {shape and tuple(shape)}", tuple(tensor.shape), name)
    size, there = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    expect(size <= there, f"{size:,} bytes", there, name)


def check_sizes(config, shapes):
    """Raise ValueError where a model of this config is far from weights of these shapes, {name: shape}, before it is built:
    a large one would take all memory, or hours."""
    C, count = config.n_embd, sum(map(math.prod, shapes.values()))
    expect(config.n_layer <= len(shapes), f"at most {len(shapes)}, the number of tensors", config.n_layer, "n_layer")
    for name, shape in (("embedding.weight", (config.vocab_size, C)), ("positions.weight", (config.block_size, C)),
                        ("head.weight", (config.n_class or config.vocab_size, *shapes.get("head.weight", ())[1:]))):
        expect(shapes.get(name, shape) == shape, f"the shape {shape}", shapes.get(name), name)
    expect("embedding.weight" in shapes and "head.weight" in shapes, "embedding and head", list(shapes)[:2], "weights")
    width = C if config.model == "gpt" else config.options.get("hidden", 1)
    expect(8 * width**2 * config.n_layer <= count, f"layers that fit {count:,} weights", width, "n_embd or hidden")


def checked_config(path, checkpoint, config_class):
    """(its config, {name: shape} of the weights) of a checkpoint. Raises ValueError or UserError unless the types and ranges
    of model_config, meta, settings and weights are right and their sizes fit one another."""
    kinds = optional_record({f.name: FIELD[f.type] for f in fields(config_class)})
    record({"model_config": kinds})(checkpoint, "the checkpoint")
    FACTS(checkpoint, "the checkpoint")
    config = config_class(**checkpoint["model_config"])
    config.check()
    defaults = config.default_options()
    for key in config.options:
        check_choice(f"option of {config.attention}", key, defaults)
        convert(key, config.options[key], defaults[key], "options")
    if "shards" in checkpoint:
        check_shards(path, checkpoint["shards"])
        entries = read_metadata(path.parent / Path(checkpoint["shards"]["folder"]).name).state_dict_metadata
        shapes = {name: tuple(entries[f"model.{name}"].size) for name in checkpoint["shards"]["names"]}
    else:
        record({"model": record({})})(checkpoint, "the checkpoint")
        for name, tensor in checkpoint["model"].items():
            check_tensor(name, tensor, None)
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["model"].items()}
    check_sizes(config, shapes)
    if "meta" in checkpoint:
        meta = checkpoint["meta"]
        try:
            check_meta(meta, "its meta")
        except UserError as error:
            raise UserError(f"it has no tokenizer that is known here ({error})")
        expect(meta["vocab_size"] == config.vocab_size, config.vocab_size, meta["vocab_size"], "vocab_size of its meta")
        if config.n_class:
            record({"classes": listing(text(), config.n_class)})(meta, "its meta")
            expect(len(meta["classes"]) == config.n_class, f"{config.n_class} classes", meta["classes"], "its meta")
    return config, shapes


def load(path, config_class, build, device="cpu", options=None, **changes):
    """(model in evaluation mode, checkpoint) from a file that `train.py` wrote.

    config_class: of the model's configuration, as model.GPTConfig; build: makes the model that one describes.
    changes: fields of it to set otherwise (kernel, dropout); options: of its mechanism's, likewise.
    Raises UserError where the file is missing, damaged or none of ours, or its weights do not fit or are not finite.
    """
    path = Path(path)
    try:
        sealed = check_whole(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint.get("sealed") and not sealed:
            raise ValueError("its end is missing")
        try:
            config, shapes = checked_config(path, checkpoint, config_class)
        except UserError as error:
            raise ValueError(error)
        given = {key: value for key, value in (options or {}).items() if config.options.get(key, value) != value}
        config = replace(config, **changes, options={**config.options, **given})
        with torch.random.fork_rng(devices=[]):  # the run's random stream is not for weights that are replaced
            model = build(config)
        state = model.state_dict()
        unlike = state.keys() ^ shapes.keys()
        if given and unlike:
            raise UserError(f"the weights in {path} are of another model than {given} makes (they differ in "
                            f"{sorted(unlike)[0]}); such an option is chosen before training")
        expect(not unlike, "the weights of its model", sorted(unlike)[:1], "weights that differ")
        for name, weight in state.items():
            expect(shapes[name] == weight.shape, f"the shape {tuple(weight.shape)}", shapes[name], name)
        if "shards" in checkpoint:
            read_shards(path, checkpoint["shards"], {"model": state})
        else:
            model.load_state_dict(checkpoint["model"])
        for name, weight in state.items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
    except FileNotFoundError as error:
        if path.exists():
            raise UserError(f"{path} is damaged: {error.filename} beside it is missing; {beside(path)}")
        raise UserError(f"no checkpoint at {path}; train one first: python train.py --out_dir={path.parent}")
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({reason}); {beside(path)}")
    return model.to(device).eval(), checkpoint


def have_best(path, state):
    """Refuse a damaged best.pt now, not after the training; without one the best is counted from here on."""
    try:
        check_whole(path)
    except FileNotFoundError:
        if state["best"] < float("inf"):
            print(f"{path} is missing: the best weights are counted from here on")
            state.update(best=float("inf"), evaluated=-1)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); take it away to go on without it: the best weights are then counted "
                        "from here on")


# ---- the optimiser, and what else a run is ----------------------------------------------------


def optimizer_state(model, optimizer):
    """{name of the weight: AdamW's tensors by name}: alike for any order, and any number of ranks, in which weights are kept."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def restore(path, checkpoint, state, model, optimizer, scaler, seed, device, dtype):
    """Put everything but the weights, which are loaded already, as it was when the checkpoint at `path` was saved, and say
    what is not as it was. Raises UserError where its state is of another model."""
    for name, now in (("device", device.split(":")[0]), ("dtype", dtype)):
        if checkpoint.get(name, now) != now:
            print(f"checkpoint: {name} was {checkpoint[name]!r}, is now {now!r}: the losses from here on differ by rounding, and "
                  "with dropout by its random stream, from those of an unbroken run")
    try:
        record({"state": STATE, "scaler": mapping(number(0, math.inf), 10), "random": listing(record({}), 2**20)})(checkpoint, "it")
        expect(checkpoint["random"], "the random stream of a rank at least", checkpoint["random"], "random")
        state |= checkpoint["state"]
        restore_optimizer(path, checkpoint, model, optimizer)
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        torch.manual_seed(seed)  # of a device that the checkpoint knows nothing of
        if (before := len(checkpoint["random"])) == dist.world:
            hardware.set_random_state(device, checkpoint["random"][dist.rank])
        else:
            print(f"checkpoint: ranks were {before}, are now {dist.world}: the same texts a step, dropout from new random "
                  "streams")
            dist.seed(seed, state["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} holds weights that fit and a state of the optimiser that does not ({error}); "
                        "put the right file back")


def restore_optimizer(path, checkpoint, model, optimizer):
    """Put AdamW's state as it was when the checkpoint at `path`, already read, was saved.

    Raises KeyError, ValueError or RuntimeError where it is of another model.
    """
    named = dict(model.named_parameters())
    if "shards" in checkpoint:
        for p in named.values():
            step = torch.zeros((), device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if checkpoint["state"]["step"]:
            read_shards(path, checkpoint["shards"], {"optimizer": optimizer_state(model, optimizer)})
        else:
            optimizer.state.clear()
        return
    saved = checkpoint["optimizer"]
    if unlike := saved.keys() ^ (named.keys() if checkpoint["state"]["step"] else set()):  # before the first step AdamW has none
        raise ValueError(f"it differs in {sorted(unlike)[0]}")
    for name, tensors in saved.items():
        p, kept = named[name], {}
        record(dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), lambda value, place: None))(tensors, name)
        expect(len(tensors) == 3, "step, exp_avg and exp_avg_sq", sorted(tensors), name)
        for key, value in tensors.items():
            check_tensor(f"{key} of {name}", value, () if key == "step" else p.shape, torch.float32 if key == "step" else p.dtype)
            if not value.isfinite().all() or key != "exp_avg" and (value < 0).any():
                raise ValueError(f"{key} of {name} holds numbers that are negative or not finite")
            value = value.to(p.device)
            kept[key] = dist.split_like(value, p) if value.dim() else value
        optimizer.state[p] = kept


# ---- a model's parts, of as many ranks --------------------------------------------------------


def write_shards(path, parts):
    """Write tensors, of which every rank holds a part, into a new folder beside `path`, by all ranks.

    parts: {"model": {name: tensor}, ...}. Returns what `read_shards` wants to know: {"folder", "files": {name: sha256},
    "names": those of the model}.
    """
    import torch.distributed.checkpoint as dcp

    n = next(n for n in range(10**6) if not path.with_name(f"{path.stem}-{n}.shards").exists())
    folder = path.with_name(f"{path.stem}-{dist.gather(n)[0]}.shards")
    try:
        dcp.save(parts, storage_writer=dcp.FileSystemWriter(folder, thread_count=1))
    except dcp.api.CheckpointException as error:
        cause = next((each for each, _ in error.failures.values() if isinstance(each, OSError)), None)
        if dist.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise SaveError(f"could not write {folder}: {cause.strerror if cause else error}; what was there before is unchanged")
    names = sorted(file.name for file in folder.iterdir())
    files = {name: sha256(folder / name) for name in names[dist.rank :: dist.world]}
    return {"folder": folder.name, "names": sorted(parts["model"]),
            "files": {name: found for each in dist.gather(files) for name, found in each.items()}}


def sha256(path):
    check_regular(path)
    with open(path, "rb") as file:
        return digest(file)


def check_shards(path, shards):
    """Raise ValueError unless the files of the folder beside `path` are as they were written; on each machine once."""
    for name, expected in shards["files"].items() if dist.local == 0 else ():
        file = path.parent / Path(shards["folder"]).name / name
        if sha256(file) != expected:
            raise ValueError(f"{file.parent.name}/{name} is not what was written, by its digest")


def read_metadata(folder):
    """The metadata of torch.distributed.checkpoint in a folder of shards: which tensors there are, and where."""
    return Facts(io.BytesIO((folder / ".metadata").read_bytes())).load()


def read_shards(path, shards, parts):
    """Fill tensors, whole ones or ones of which each rank holds a part, from the folder beside `path`."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *arguments, **named):
            metadata = read_metadata(Path(self.path))
            metadata.storage_meta.load_id = self.load_id
            return metadata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a process alone reads what many wrote is meant so
            dcp.load(parts, storage_reader=Reader(path.parent / Path(shards["folder"]).name), no_dist=True)
    except dcp.api.CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0]))


class Facts(pickle.Unpickler):
    """For the one file of a folder of shards that is a pickle: what its tensors are and where, and nothing that runs."""

    known = {
        "torch.distributed.checkpoint.metadata": ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                                                  "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "float32", "bfloat16", "float16", "int64"),
        "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),
    }

    def find_class(self, module, name):
        if name not in self.known.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def drop_shards(folder):
    """Remove the folders of shards that no checkpoint beside them speaks of."""
    there, wanted = list(folder.glob("*.shards")), set()
    for name in ("ckpt.pt", PREVIOUS, "best.pt") if there else ():
        if (folder / name).is_file():
            wanted.add(torch.load(folder / name, weights_only=True, mmap=True).get("shards", {}).get("folder"))
    for path in there:
        if path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)
