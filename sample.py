"""Generate text from a trained model, or classify a text: python sample.py --out_dir=out --start="..."

`--start=FILE:path` reads the prompt from a file, `--start=-` from standard input. A classifier prints the label and its
probability; for a file or standard input, one line for each line.

`--next=5` prints the five most likely next tokens instead of text: after the prompt, or after each line of a file or of
standard input. Generated text ends before the mark between documents, if the data has one, and before `--stop=TEXT`
(several: `--stop="['TEXT', 'TEXT']"`).

Past the block size, rotary positions keep counting and each token sees the last block_size tokens; learned and
sinusoidal positions end there, and generation restarts from the last block_size / 2 tokens.
"""

from core import startup  # first: torch reads its settings when it is loaded

import os
import sys
import time
from pathlib import Path

import torch

from core import hardware
from core.config import UserError, configure, parse, run_main
from core.inference import Printer, convert_for_inference, encode_prompt, next_tokens, predict
from core.tokenizer import Tokenizer, printable
from model import load

out_dir = ""  # the run's folder; default: out, or the newest run in this folder if out does not exist
checkpoint = ""  # a file in out_dir; default: best.pt, or ckpt.pt if there is no best.pt yet
start = ""  # the prompt; default: the beginning of a document
num_samples = 3
max_new_tokens = 500  # of each sample, if it does not end earlier
stop = []  # texts; generated text ends before the first of them
next = 0  # print so many next tokens with their probabilities before temperature, top_k and top_p; 0: generate text
temperature = 0.8  # 0: always the most likely token
top_k = 200  # sample from the k most likely tokens; 0: from all
top_p = 1.0  # sample from the smallest set of most likely tokens with this share of the probability
seed = 1337
device = "auto"
dtype = "auto"
threads = 0  # on a CPU; 0: per token one thread or all, whichever is faster at the moment


def read_prompt():
    """The prompt that `start` names. Raises UserError if it cannot be read."""
    try:
        if start.startswith("FILE:"):
            return Path(start[5:]).read_text("utf-8")
        return sys.stdin.read() if start == "-" else start
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no valid path
        raise UserError(f"cannot read the prompt {start}: {error}; give a text, FILE:path of a UTF-8 file, or -")


def read_run(path, device="cpu"):
    """(model, tokenizer, class names) of a checkpoint.

    Raises UserError for a checkpoint that cannot be used, ConnectionError if the gpt2 vocabulary cannot be downloaded.
    """
    model, saved = load(path, device)
    try:
        return model, Tokenizer(saved["meta"]), saved["meta"].get("classes", [])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no tokenizer that is known here ({error!r}); train it again")


def find_run():
    """The folder to read: out_dir, by default out, or the newest run in this folder if out does not exist."""
    if out_dir or Path("out").exists():
        return Path(out_dir or "out")
    checkpoints = [path for name in ("best.pt", "ckpt.pt") for path in Path().glob(f"*/{name}") if path.is_file()]
    if not checkpoints:
        return Path("out")
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime).parent
    others = sorted({str(path.parent) for path in checkpoints} - {str(newest)})
    print(f"out does not exist: using the newest run, {newest}; choose another with --out_dir"
          + (f" ({', '.join(others)})" if others else ""), file=sys.stderr)
    return newest


def write_text(model, tokenizer, text):
    """Print `num_samples` continuations of the text while they are generated, and their speed on stderr."""
    idx = torch.tensor([encode_prompt(tokenizer, text)], device=device)  # (1, T)
    for n in range(num_samples):
        started, printer, count = time.perf_counter(), Printer(tokenizer, text[-1:], stop), 0
        generator = torch.Generator(device).manual_seed(seed + n)
        print(text, end="", flush=True)
        tokens = model.generate_stream(idx, max_new_tokens, temperature, top_k, top_p, generator)
        for token in tokens if threads else hardware.adapt_threads(tokens, device):  # (1,)
            print(printer([int(token)]), end="", flush=True)
            count += 1
            if printer.ended:
                break
        print(printer([], final=True) + "\n" + "-" * 40, flush=True)
        speed = count / (time.perf_counter() - started)
        print(f"{count} tokens, {speed:,.0f} tokens/s", file=sys.stderr)


def write_next(model, tokenizer, prompts):
    """Print the `next` most likely tokens after the last block_size tokens of each prompt, most likely first."""
    if not prompts:
        raise UserError('expected a prompt on each line, got none; give --start="...", FILE:path or -')
    for prompt in prompts:
        line = printable(prompt.encode("utf-8", "replace")) or "(no prompt)"
        print(f"after {line if len(line) <= 80 else f'...{line[-77:]}'}")
        ids = encode_prompt(tokenizer, prompt)[-model.config.block_size :]
        for token, p in next_tokens(model, tokenizer, torch.tensor([ids], device=device), next):
            print(f"  {p:.4f}  {token}", flush=True)
    print("probabilities before temperature, top_k and top_p", file=sys.stderr)


def classify(model, tokenizer, classes, texts):
    """Print each text's label, its probability, and the first 80 characters of the text, as soon as they are known."""
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError('expected a text to classify, got none; give --start="...", FILE:path or -')
    for first in range(0, len(texts), 32):
        group = texts[first : first + 32]
        for text, p in zip(group, predict(model, tokenizer, group, device, dtype).tolist()):
            line = " ".join(text.split())
            line = line if len(line) <= 80 else f"{line[:77]}..."
            print(f"{classes[p > 0.5]} {max(p, 1 - p):.3f}  {line}", flush=True)


def as_list(argument):
    """`--stop=TEXT` as `--stop=['TEXT']`; any other argument as it is."""
    key, _, value = argument.partition("=")
    is_text = key == "--stop" and type(parse(value, list)) is not list
    return f"{key}={[value] if value else []}" if is_text else argument


def check():
    """Raise UserError for a setting out of range."""
    smallest = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0, "threads": 0, "next": 0}
    for key, least in smallest.items():
        if not globals()[key] >= least:
            raise UserError(f"{key} must be at least {least}, got {globals()[key]}")
    if threads > os.cpu_count():
        raise UserError(f"threads must be at most {os.cpu_count()}, this machine's processors, got {threads}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not all(type(text) is str and text for text in stop):
        raise UserError(f"stop expects a text, or a list of texts like ['END', '###'], got {stop}")


def main():
    global device, dtype
    configure(globals(), [as_list(argument) for argument in sys.argv[1:]])
    check()
    torch.set_num_threads(threads or hardware.THREADS)
    device = hardware.pick_device(device)
    folder, text = find_run(), read_prompt()
    name = checkpoint or ("best.pt" if (folder / "best.pt").exists() else "ckpt.pt")
    model, tokenizer, classes = read_run(folder / name, device)
    dtype = hardware.pick_dtype(dtype, device)
    by_line = start == "-" or start.startswith("FILE:")
    lines = text.split("\n") if by_line else [text]  # other line ends are text
    if not model.config.causal:
        if next or stop:
            key = "next" if next else "stop"
            raise UserError(f"{folder} holds a classifier, which draws no tokens: leave {key} out")
        classify(model, tokenizer, classes, lines)
        return
    convert_for_inference(model, hardware.DTYPES[dtype])
    if next:
        write_next(model, tokenizer, [line for line in lines if line or not by_line])
    else:
        write_text(model, tokenizer, text)


if __name__ == "__main__":
    run_main(main)
