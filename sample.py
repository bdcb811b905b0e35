"""Text from a trained model, or the label of a text: python sample.py --out_dir=out --start="..."

`--start=FILE:path` reads the prompt from a file and `--start=-` from standard input. A classifier
prints the label and its probability; of a file or standard input, a line for each line.

Past the block size, rotary positions go on counting and every token sees the latest block; learned
and sinusoidal positions end there, and the text goes on from its latest half block.
"""

import sys
import time
from pathlib import Path

import torch

import hardware
from configurator import UserError, configure, run
from model import load
from tokenizer import Tokenizer

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


def read_prompt():
    """The text that `start` names."""
    try:
        if start.startswith("FILE:"):
            return Path(start[5:]).read_text("utf-8")
        return sys.stdin.read() if start == "-" else start
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {start}: {error}; give a text, FILE:path of a UTF-8 file, or -")


def encode(tokenizer, text):
    """Token ids of a text that begins a document."""
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise UserError(str(error))
    return ([] if tokenizer.mark is None else [tokenizer.mark]) + ids


def write_text(model, tokenizer, text):
    """Print `num_samples` continuations of the text as they are drawn, and their speed on stderr."""
    ids = encode(tokenizer, text) or encode(tokenizer, "\n")
    if dtype != "float32":
        model = model.to(hardware.DTYPES[dtype])
    idx = torch.tensor([ids], device=device)
    for n in range(num_samples):
        began, made, shown = time.perf_counter(), [], ""
        generator = torch.Generator(device).manual_seed(seed + n)
        print(text, end="", flush=True)
        for token in model.stream(idx, max_new_tokens, temperature, top_k, top_p, generator):
            made.append(int(token))
            new = tokenizer.decode(ids + made)[len(tokenizer.decode(ids)) :]
            if not new.endswith("\ufffd"):  # else a character is still incomplete
                print(new[len(shown) :], end="", flush=True)
                shown = new
        print("\n" + "-" * 40, flush=True)
        speed = len(made) / (time.perf_counter() - began)
        print(f"{len(made)} tokens, {speed:,.0f} tokens/s", file=sys.stderr)


@torch.no_grad()
def classify(model, tokenizer, classes, texts):
    """Print the label of each text with its probability."""
    texts, block = [text for text in texts if text.strip()], model.config.block_size
    if not texts:
        raise UserError("expected a text to classify, got none; give --start=\"...\", FILE:path or -")
    for first in range(0, len(texts), 32):
        group = [torch.tensor(encode(tokenizer, text)[:block]) for text in texts[first : first + 32]]
        lengths = torch.tensor([len(ids) for ids in group], device=device)
        x = torch.nn.utils.rnn.pad_sequence(group, batch_first=True).to(device)
        with hardware.autocast(device, dtype):
            p = torch.softmax(model(x, lengths=lengths)[0].float(), -1)
        for text, row in zip(texts[first : first + 32], p):
            print(f"{classes[int(row.argmax())]} {row.max():.3f}  {' '.join(text.split())[:80]}")


def main():
    global device, dtype
    configure(globals())
    for key, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if globals()[key] < least:
            raise UserError(f"{key} must be at least {least}, got {globals()[key]}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
    device = hardware.pick_device(device)
    dtype = hardware.pick_dtype(dtype, device)
    folder = Path(out_dir)
    model, saved = load(folder / (checkpoint or ("best.pt" if (folder / "best.pt").exists() else "ckpt.pt")), device)
    tokenizer, text = Tokenizer(saved["meta"]), read_prompt()
    if model.config.causal:
        write_text(model, tokenizer, text)
    else:
        one = not (start == "-" or start.startswith("FILE:"))
        classify(model, tokenizer, saved["meta"]["classes"], [text] if one else text.splitlines())


if __name__ == "__main__":
    run(main)
