"""What app.py does besides showing it: finds runs, trains recipes in processes of their own, and makes of a model's
output what the page shows. No Streamlit here.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from core import ROOT, hardware, heat, inference, readers
from core.config import UserError
from core.tokenizer import UNKNOWN, words

DEPTH = 3  # folders below the working folder in which runs are looked for
QUIET = 120  # seconds without a line in its log after which a run is taken for stopped
RECIPES = {  # data/NAME/prepare.py, then config/train_NAME.py: (kind, what it is)
    "sentences": ("classify", "a toy of 6,000 made-up opinions in 128 words; seconds"),
    "imdb": ("classify", "25,000 film reviews; downloads 84 MB, then trains for about 4 minutes"),
    "stdlib": ("lm", "Python's own library as bytes; about 2 minutes"),
    "toy": ("lm", "six sentences; seconds"),
}


def plain(text):
    """A text for a place that shows Markdown, with nothing left in it that Markdown would obey."""
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


# ---- runs ------------------------------------------------------------------------------------


def find_runs(name):
    """({label: folder} of the folders that hold a file of this name, newest first; [why a folder is skipped])."""
    times, skipped = {}, []
    for folder, inside, files in os.walk("."):
        inside[:] = [other for other in inside if other[0] not in "._"] if folder.count(os.sep) < DEPTH else []
        if name in files:
            path = Path(folder) / name
            try:
                readers.check_regular(path)
                times[path.parent] = path.stat().st_mtime
            except UserError as error:
                skipped.append(str(error))
            except OSError as error:  # a link to nothing, a folder without rights, a file that has just been removed
                skipped.append(f"{path}: {error.strerror}")
    newest = sorted(times, key=times.get, reverse=True)
    return {str(folder) if folder.name else Path.cwd().name: folder for folder in newest}, skipped


def first_record(folder):
    """The first record of a run's log (dict); {} where there is none."""
    try:
        return readers.read_first_record(folder / "log.jsonl")
    except (OSError, ValueError, UserError):
        return {}


def kind_of(folder):
    """'classify' or 'lm' by a run's log, '' where it has none."""
    record = first_record(folder)
    return "classify" if "accuracy" in record else "lm" if record else ""


def running(folder):
    """Whether the run in a folder is training now, as far as its log tells."""
    return time.time() - (folder / "log.jsonl").stat().st_mtime < QUIET and not readers.read_log(folder / "log.jsonl")[1]


# ---- training --------------------------------------------------------------------------------

jobs = {}  # {name of a recipe: its latest job}, of all visitors


class Job:
    """Prepares and trains a recipe in the working folder. code: None while it goes on, then the exit code."""

    def __init__(self, name):
        self.name, self.code, self.process = name, None, None
        self.said = tempfile.NamedTemporaryFile()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        code = 1
        try:
            for command in ([ROOT / f"data/{self.name}/prepare.py"], [ROOT / "train.py", ROOT / f"config/train_{self.name}.py"]):
                self.process = subprocess.Popen([sys.executable, *command], stdout=self.said, stderr=subprocess.STDOUT)
                if code := self.process.wait():
                    break
        finally:
            self.code = code

    def lines(self):
        """The end of what it said; the last line says how it goes, or what went wrong."""
        return Path(self.said.name).read_text("utf-8", "replace")[-4000:].strip().splitlines() or ["starting ..."]

    def stop(self):
        """End it as Ctrl-C does: train.py saves and leaves."""
        if self.process:
            self.process.terminate()


def start(name):
    """Begin a recipe, unless another visitor just did."""
    if name not in jobs or jobs[name].code is not None:
        jobs[name] = Job(name)


# ---- what is shown ---------------------------------------------------------------------------


def as_words(tokenizer, ids, text):
    """(words, whether the model knows each, tokens of each) of a text's tokens."""
    names, sizes = zip(*heat.words_of(tokenizer, ids, [1] * len(ids)))
    known, own = [name != UNKNOWN for name in names], words(text)
    if tokenizer.kind == "words" and tokenizer.encode(" ".join(own))[: len(ids) - 1] == ids[1:]:
        names = [names[0], *own[: len(ids) - 1]]  # as typed, also where the vocabulary lacks it
    return [name if len(name) <= 60 else name[:60] + "…" for name in names], known, [int(size) for size in sizes]


def stream(model, tokenizer, device, prompt, seed, *how):
    """(what is drawn so far, an iterator that draws a token into it and yields True). Raises UserError for a prompt."""
    ids, block = inference.encode(tokenizer, prompt), model.config.block_size
    if not ids:  # as in sample.py: after a line's end, or any token
        ids = [i for i in range(tokenizer.vocab_size) if tokenizer.decode_bytes([i]) == b"\n"][:1] or [0]
    state = {"text": prompt if len(prompt) < 2000 else "…" + prompt[-2000:], "tokens": 0, "seconds": 0.0, "note": ""}
    if len(ids) > block:
        state["note"] = f"; the prompt is longer than the context: its last {block} tokens are read"
    idx, generator = torch.tensor([ids[-block:]], device=device), torch.Generator(device).manual_seed(seed)

    def draw():
        before, printer = time.perf_counter(), inference.Printer(tokenizer, prompt[-1:])
        for token in hardware.adapt_threads(model.generate_stream(idx, *how, generator), device):
            state["text"] += printer([int(token)])
            state["tokens"] += 1
            state["seconds"] += time.perf_counter() - before
            yield True
            before = time.perf_counter()  # what passes in between is not this model's

    return state, draw()


def png(draw, *arguments):
    """The picture (bytes) that a function of plot.py or pattern.py writes to its last argument."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        draw(*arguments, path := Path(folder) / "picture.png")
        return path.read_bytes()
