"""Import weights and data, and export weights:

python convert.py SOURCE --out_dir=OUT [--meta=meta.pkl]    makes a run, or a prepared folder, of SOURCE
python convert.py RUN --to=FILE.safetensors                 writes a run's weights, and config.json beside

SOURCE is recognised by its content:
    ckpt.pt of nanoGPT, or its folder            a run; its training can be resumed
    nanoGPT's train.bin and val.bin: a folder    a prepared folder: train.py --dataset=OUT
    GPT-2 of Hugging Face: a folder              a run; config.json and model.safetensors
    FILE.safetensors that --to wrote             a run

The tokenizer of an imported model is GPT-2's, or the characters that nanoGPT's meta.pkl holds. No code of a
file is run: what is more than tensors and plain values is refused.
"""

from core import startup  # first: torch reads its settings when it is loaded

import math
import sys
from pathlib import Path

from core import exchange, foreign, nanogpt
from core.archive import identity
from core.config import UserError, configure, run_main
from core.runs import check_folder
from model import GPTConfig, load, new_model

out_dir = ""  # where to write the run or the prepared folder
meta = ""  # nanoGPT's meta.pkl with the characters; default: that of a data folder, or GPT-2's tokens
to = ""  # export to this file


def read_weights(source):
    """(checkpoint, as core/checkpoint.py describes it, and what it was read from) of weights in a file or folder.

    Raises UserError for anything else.
    """
    file = source / "ckpt.pt" if source.is_dir() else source
    if source.is_dir() and (source / "best.pt").exists():
        raise UserError(f"{source} is a run already: sample.py and train.py read it, --to=FILE.safetensors exports it")
    if source.suffix == ".safetensors" or not file.exists():
        files = exchange.weight_files(source) if source.is_dir() else [source]
        if not files:
            raise UserError(f"{source}: expected nanoGPT's ckpt.pt, or its train.bin and val.bin, or GPT-2 of Hugging "
                            "Face (config.json and model.safetensors), found none of them; give another SOURCE")
        saved, mark = exchange.read_safetensors(files), True
        file = files[0] if len(files) == 1 else source
    else:
        saved, mark = nanogpt.read_checkpoint(file), False
    if "meta" not in saved:
        saved["meta"] = nanogpt.tokenizer_meta(saved["model_config"]["vocab_size"], meta, mark)
    elif meta:
        raise UserError(f"{file} has its tokenizer beside it: leave --meta out")
    return saved, file


def import_run(source):
    """Write the weights in `source` as a run into out_dir, and print what they are."""
    folder = Path(out_dir)
    check_folder(folder)
    saved, file = read_weights(source)
    model = exchange.build(file, saved, GPTConfig, new_model)
    exchange.write_run(folder, model, saved, identity(file))
    config, state, tokenizer = model.config, saved["state"], saved["meta"]["tokenizer"]
    loss = f", validation loss {state['best']:.4f}" if config.causal and math.isfinite(state["best"]) else ""
    resume = "" if saved.get("optimizer") else "; without the state of an optimiser, so it cannot be resumed"
    print(f"{file}: step {state['step']}{loss}, {config.n_layer} layers of {config.n_embd}, "
          f"{model.parameter_count():,} parameters, tokenizer {tokenizer} of {config.vocab_size:,}{resume}\n"
          f"{folder} is a run now; sample with: python sample.py --out_dir={folder}")


def export_run(source):
    """Write the weights of a run, or of a checkpoint, to the file `to`."""
    file = source
    if source.is_dir():
        file = source / ("best.pt" if (source / "best.pt").exists() else "ckpt.pt")
    model = exchange.export(file, Path(to), load)
    print(f"{to}: {model.parameter_count():,} parameters of {file}; config.json beside it holds the model's shape and "
          f"its tokenizer\nimport it again with: python convert.py {to} --out_dir=NEW_FOLDER")


def main():
    sources = [Path(argument) for argument in sys.argv[1:] if argument[:1] != "-"]
    configure(globals(), [argument for argument in sys.argv[1:] if argument[:1] == "-"])
    if len(sources) != 1 or bool(out_dir) == bool(to):
        raise UserError("expected python convert.py SOURCE --out_dir=OUT, or "
                        "python convert.py RUN --to=FILE.safetensors")
    source, = sources
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder")
    if to:
        if not to.endswith(".safetensors"):
            raise UserError(f"to expects a file whose name ends in .safetensors, got {to!r}")
        return export_run(source)
    if Path(out_dir).resolve() in (source.resolve(), source.resolve().parent):
        raise UserError("out_dir is the folder of SOURCE: give another one")
    if foreign.explain_data(source):
        beside = source / "meta.pkl"
        return nanogpt.convert_data(source, Path(out_dir), meta or (beside if beside.exists() else ""))
    import_run(source)


if __name__ == "__main__":
    run_main(main)
