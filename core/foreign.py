"""Files of other programs, recognised where this repository's own are expected: words for errors that say what to do.

convert.py reads these files.
"""


def command(source):
    """The command that imports `source`, for messages."""
    return f"python convert.py {source} --out_dir=NEW_FOLDER"


def explain_checkpoint(path, checkpoint):
    """What to do with nanoGPT's checkpoint (dict) at `path`; '' for another one."""
    if "model_args" in checkpoint and "model_config" not in checkpoint:
        return f"{path} is a checkpoint of nanoGPT; make a run of it first: {command(path)}"
    return ""


def explain_missing(path):
    """What to do if there is no checkpoint at `path`, by what is beside it."""
    folder = path.parent
    if path.name == "ckpt.pt" and (folder / "best.pt").exists():
        return f"best.pt beside it holds weights, but no state of a training: start from them with --init_from={folder}"
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        return f"{folder} holds weights of another program; make a run of them first: {command(folder)}"
    return f"train one first: python train.py --out_dir={folder}"


def explain_data(folder):
    """What to do with nanoGPT's data folder: flat files of tokens, and no meta.json, finished or not; '' for others."""
    if (folder / "train.bin").exists() and not any(folder.glob("meta.json*")):
        return f"{folder} is a data folder of nanoGPT; prepare it first: {command(folder)}"
    return ""


def explain_setting(key):
    """What to do with a setting of nanoGPT's train.py that train.py lacks; '' for others."""
    lacking = {"always_save_checkpoint": "ckpt.pt is saved at every evaluation", "backend": "it follows the device"}
    if key in lacking:
        return (f"; it is a setting of nanoGPT: remove it ({lacking[key]}); the weights and the data of nanoGPT are "
                "imported by python convert.py SOURCE --out_dir=NEW_FOLDER")
    return ""
