"""Runs made of weights from elsewhere, and the weights of runs as safetensors with a config.json beside.

The package safetensors is imported where it is needed.
"""

import json
import math
from dataclasses import asdict

import torch

from core import gpt2
from core.checkpoint import build_with_weights, save
from core.checkpoint_schema import STATE, ModelEdited, checked_config
from core.config import UserError, one_line
from core.readers import check_regular, mapping, read_json, record, text
from core.runs import SaveError, locked, prepare_folder, write_text, write_whole

# ---- a run of imported weights -----------------------------------------------------------------


def build(source, checkpoint, config_class, new_model):
    """The model of an imported checkpoint (dict with model_config, model, meta, settings).

    source: where it comes from, for messages; config_class, new_model: see `checkpoint.load`. Raises UserError if
    anything in it does not fit.
    """
    try:
        config, shapes = checked_config(source, checkpoint, config_class)
        return build_with_weights(source, checkpoint, config, shapes, new_model, {})
    except ModelEdited as error:
        raise UserError(error.difference)
    except (ValueError, KeyError, UserError) as error:
        raise UserError(f"{source} holds no model that fits ({one_line(error)})")


def write_run(folder, model, checkpoint, origin):
    """Write an imported model as a run into `folder`; an earlier run there is moved aside.

    best.pt holds the weights; ckpt.pt too, with the optimiser's state, if there is one, so that the training can be
    resumed. log.jsonl holds the validation loss, if it is known. origin: a dict that says where the weights come from,
    for config.json. Raises SaveError if the system refuses to write; no file of the run remains then.
    """
    config, state = asdict(model.config), checkpoint["state"]
    meta = {"kind": "lm" if model.config.causal else "classify", **checkpoint["meta"]}
    of_the_data = ("options", "document_mark")  # and of the mechanism: no settings of train.py
    settings = {**checkpoint["settings"], **{key: value for key, value in config.items() if key not in of_the_data}}
    common = {"settings": settings, "source": origin, "device": "cpu", "dtype": "float32"}
    saved = {**common, "model_config": config, "meta": meta, "state": state, "model": model.state_dict()}
    score = {"step": state["best_step"], "split": "val", "loss": state["best"]}
    described = {**common, "options": config["options"], "parameters": model.parameter_count()}
    with locked(folder):
        prepare_folder(folder)
        try:
            if optimizer := checkpoint.get("optimizer"):
                stream = torch.Generator().manual_seed(0).get_state()
                save(folder / "ckpt.pt", {**saved, "optimizer": optimizer, "random": [{"random": stream}]})
            save(folder / "best.pt", saved)
            if model.config.causal and state["best"] < math.inf:
                write_text(folder / "log.jsonl", json.dumps(score) + "\n")
            write_text(folder / "config.json", json.dumps(described, indent=1))
        except SaveError:
            for name in ("ckpt.pt", "best.pt", "log.jsonl"):
                (folder / name).unlink(missing_ok=True)
            raise


# ---- safetensors -------------------------------------------------------------------------------


def read_tensors(paths):
    """{name: tensor} of safetensors files. Raises UserError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in paths:
        check_regular(path)
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path} is damaged or no safetensors file ({one_line(error, 200)})")
    return tensors


def weight_files(folder):
    """The safetensors files of a folder: those that its index names, or model.safetensors, or the only one, or []."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index, record({"weight_map": mapping(text(), 10**6)}), "Hugging Face")["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
        if outside := [path for path in files if path.resolve().parent != folder.resolve()]:
            raise UserError(f"{index} names {outside[0]}, expected files of its own folder")
        return files
    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise UserError(f"{folder} holds {len(files)} safetensors files, none of them model.safetensors: give one")
    return files


EXPORTED = record({"model_config": record({}), "meta": record({}), "state": STATE})
NEW_STATE = {"step": 0, "evaluated": -1, "best": math.inf, "best_step": 0, "worse": 0, "seconds": 0.0, "work": 0.0}
OF_THE_DATA = ("source", "splits", "split_rule", "options", "partial")  # entries of a meta.json that no model needs


def read_safetensors(files):
    """Safetensors files with a config.json beside as a checkpoint of core/checkpoint.py: of `export`, or of Hugging
    Face's GPT-2, then without meta. Raises UserError for anything else."""
    path = files[0].with_name("config.json")
    if not path.exists():
        raise UserError(f"{path} is missing: expected it beside {files[0].name}, with the shape of the model")
    config = read_json(path, record({}), "Hugging Face or --to")
    try:
        if "model_config" in config:
            EXPORTED(config, "it")
            weights = read_tensors(files)
            if is_tied(config["model_config"]) and "embedding.weight" in weights:
                weights.setdefault("head.weight", weights["embedding.weight"])
            return {"model_config": config["model_config"], "model": weights, "meta": config["meta"], "settings": {},
                    "state": {**NEW_STATE, **config["state"]}}
        shape = gpt2.shape_of(config)
        model_config, weights = gpt2.model_of(gpt2.rename(read_tensors(files), transposed=True), shape)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path.parent} holds no GPT-2 of Hugging Face, and no export of a run ({one_line(error)})")
    return {"model_config": model_config, "model": weights, "settings": {}, "state": NEW_STATE}


def is_tied(model_config):
    """Whether the head of a model, by its configuration (dict), is the token embedding."""
    return not model_config.get("n_class") and model_config.get("tie") is True


def export(path, to, load):
    """Write the weights of the checkpoint at `path` to the file `to`, a tied one once, and config.json beside: the
    model's configuration, its tokenizer, its step and its best score. load: model.load.

    Raises UserError if one of the files exists, SaveError if the system refuses to write; neither file remains then.
    """
    import safetensors.torch

    model, saved = load(path)
    description, config = to.with_name("config.json"), asdict(model.config)
    if "meta" not in saved:
        raise UserError(f"{path} has no tokenizer that is known here; train it again")
    if existing := [file for file in (to, description) if file.exists()]:
        raise UserError(f"{existing[0]} exists already: give --to a new folder")
    try:
        state = saved.get("state", {})
        STATE(state, "its state")
        state = {key: state[key] for key in ("step", "best", "best_step") if key in state and math.isfinite(state[key])}
        meta = {key: value for key, value in saved["meta"].items() if key not in OF_THE_DATA}
        described = json.dumps({"model_config": config, "meta": meta, "state": state}, indent=1)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({one_line(error)})")
    weights = model.state_dict()
    if is_tied(config):
        del weights["head.weight"]
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_text(description, described)
        write_whole(to, lambda file: file.write(safetensors.torch.save(weights, {"format": "pt"})))
    except SaveError:
        description.unlink(missing_ok=True)
        raise
    return model
