"""Text from a trained model, or the label of a text: python sample.py --out_dir=out --start="..."

`--start=FILE:path` reads the prompt from a file and `--start=-` from standard input. A classifier
prints the label and its probability; of a file or standard input, a line for each line.

Past the block size, rotary positions go on counting and every token sees the latest block; learned
and sinusoidal positions end there, and generation restarts from the last block_size / 2 tokens.
"""

from core import openmp  # first: torch reads its settings when it is loaded

import os
import sys
import time
from pathlib import Path

import torch

from core import hardware
from core.config import UserError, configure, run
from core.inference import Printer, convert_for_inference, encode, predict
from core.tokenizer import Tokenizer
from model import load

out_dir = "out"
checkpoint = ""  # a file in out_dir; default: best.pt, or ckpt.pt where there is none yet
start = ""  # the prompt; nothing: the beginning of a document
num_samples = 3
max_new_tokens = 500  # of each sample
temperature = 0.8  # 0: always the likeliest token
top_k = 200  # draw from the k likeliest only; 0: from all
top_p = 1.0  # draw from the fewest that hold this share of the probability
seed = 1337
device = "auto"
dtype = "auto"
threads = 0  # of a CPU; 0: all, and each token with one or all, whichever is faster at the moment


def read_prompt():
    """The text that `start` names."""
    try:
        if start.startswith("FILE:"):
            return Path(start[5:]).read_text("utf-8")
        return sys.stdin.read() if start == "-" else start
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name of a file at all
        raise UserError(f"cannot read the prompt {start}: {error}; give a text, FILE:path of a UTF-8 file, or -")


def read_run(path, device="cpu"):
    """(model, tokenizer, class names) of a checkpoint. Raises UserError; ConnectionError where gpt2 cannot be loaded."""
    model, saved = load(path, device)
    try:
        return model, Tokenizer(saved["meta"]), saved["meta"].get("classes", [])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no tokenizer that is known here ({error!r}); train it again")


def write_text(model, tokenizer, text):
    """Print `num_samples` continuations of the text as they are drawn, and their speed on stderr."""
    ids = encode(tokenizer, text)
    if not ids:  # no prompt, and no document mark either: begin after a line's end, or any token
        ids = [i for i in range(tokenizer.vocab_size) if tokenizer.decode_bytes([i]) == b"\n"][:1] or [0]
    idx = torch.tensor([ids], device=device)  # (1, T)
    for n in range(num_samples):
        began, printer = time.perf_counter(), Printer(tokenizer, text[-1:])
        generator = torch.Generator(device).manual_seed(seed + n)
        print(text, end="", flush=True)
        tokens = model.generate_stream(idx, max_new_tokens, temperature, top_k, top_p, generator)
        for token in tokens if threads else hardware.adapt_threads(tokens, device):  # (1,)
            print(printer([int(token)]), end="", flush=True)
        print(printer([], final=True) + "\n" + "-" * 40, flush=True)
        speed = max_new_tokens / (time.perf_counter() - began)
        print(f"{max_new_tokens} tokens, {speed:,.0f} tokens/s", file=sys.stderr)


def classify(model, tokenizer, classes, texts):
    """Print the label of each text with its probability and the text's beginning."""
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError('expected a text to classify, got none; give --start="...", FILE:path or -')
    for first in range(0, len(texts), 32):  # as they are done
        group = texts[first : first + 32]
        for text, p in zip(group, predict(model, tokenizer, group, device, dtype).tolist()):
            print(f"{classes[p > 0.5]} {max(p, 1 - p):.3f}  {' '.join(text.split())[:80]}", flush=True)


def main():
    global device, dtype
    configure(globals())
    for key, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0), ("threads", 0)):
        if not globals()[key] >= least:
            raise UserError(f"{key} must be at least {least}, got {globals()[key]}")
    if threads > os.cpu_count():
        raise UserError(f"threads must be at most {os.cpu_count()}, this machine's processors, got {threads}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
    torch.set_num_threads(threads or hardware.THREADS)
    device = hardware.pick_device(device)
    folder, text = Path(out_dir), read_prompt()
    name = checkpoint or ("best.pt" if (folder / "best.pt").exists() else "ckpt.pt")
    model, tokenizer, classes = read_run(folder / name, device)
    dtype = hardware.pick_dtype(dtype, device)
    if model.config.causal:
        write_text(convert_for_inference(model, hardware.DTYPES[dtype]), tokenizer, text)
    else:
        one = not (start == "-" or start.startswith("FILE:"))
        classify(model, tokenizer, classes, [text] if one else text.split("\n"))  # other line ends are text


if __name__ == "__main__":
    run(main)
