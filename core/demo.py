"""The parts of app.py that show nothing: finding runs, training recipes in processes, words, text and times."""

import html
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from core import ROOT, curves, explain, hardware, inference, readers, timing
from core.config import UserError
from core.mechanisms import mechanisms
from core.runs import format_scores, format_stats
from core.tokenizer import UNKNOWN, words

EXAMPLES = {  # {choice: (mechanism, options that show what it does)}
    "dense": ("dense", {}),
    "sparse, local": ("sparse", {"window": 32}),
    "sparse, strided": ("sparse", {"sparse_pattern": "strided"}),
    "sparse, fixed": ("sparse", {"sparse_pattern": "fixed", "fixed_columns": 1}),
    "sparse, log": ("sparse", {"sparse_pattern": "log", "window": 4}),
    "adaptive span": ("adaptive_attention_span", {"span_init": [4.0, 16.0, 48.0, 112.0], "softness_span_mask": 16}),
    "adaptive span, periodic": ("adaptive_attention_span", {
        "span_init": [16.0, 48.0, 80.0, 112.0], "softness_span_mask": 16, "use_triangle_wave_masking": True}),
    "atrt": ("atrt", {}),
}
DEPTH = 3  # folders below the working folder in which runs are searched
QUIET = 120  # seconds without a new line in its log after which a run counts as stopped
RECIPES = {  # data/NAME/prepare.py, then config/train_NAME.py: (kind, description)
    "sentences": ("classify", "a toy, 6,000 made-up opinions of 128 words; seconds"),
    "imdb": ("classify", "25,000 film reviews; downloads 84 MB, then trains for about 4 minutes"),
    "stdlib": ("lm", "Python's standard library as bytes; about 2 minutes"),
    "toy": ("lm", "a toy, six sentences; seconds"),
}
TOYS = "sentences", "toy"  # data sets
STYLE = """.shaded {line-height: 2.1}
.shaded span {padding: 2px 4px; border-radius: 4px; overflow-wrap: anywhere; unicode-bidi: isolate}"""


def escape_markdown(text):
    """A text, cut in the middle if it is long, without effect as Markdown."""
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def find_runs(name):
    """({label: folder} of the folders with a file of this name, newest first; [the reason for each one skipped])."""
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
            except OSError as error:  # a broken link, missing rights, or a file that was just removed
                skipped.append(f"{path}: {error.strerror}")
    newest = sorted(times, key=times.get, reverse=True)
    return {str(folder) if folder.name else Path.cwd().name: folder for folder in newest}, skipped


def first_record(folder):
    """The first record of a run's log (dict); {} if there is none."""
    try:
        return readers.read_first_record(folder / "log.jsonl")
    except (OSError, ValueError, UserError):
        return {}


def kind_of(folder):
    """'classify' or 'lm' by a run's log; '' without a log."""
    record = first_record(folder)
    return "classify" if "auc" in record else "lm" if record else ""


def is_toy(folder):
    """Whether a run was trained on one of TOYS, by its config.json."""
    try:
        return Path(str(readers.read_config(folder / "config.json")["settings"].get("dataset"))).name in TOYS
    except (OSError, UserError):
        return False


def best_run(runs):
    """The label of the run to show first of `runs`, newest first: the newest with a log that is no toy, else the newest
    with a log, else the newest; None of none."""
    return min(runs, key=lambda label: (not kind_of(runs[label]), is_toy(runs[label])), default=None)


def is_running(folder):
    """Whether the run in a folder is training now, judged by its log. Raises UserError, OSError if it is unreadable."""
    path = folder / "log.jsonl"
    return time.time() - path.stat().st_mtime < QUIET and not readers.read_log(path)[1]


jobs = {}  # {name of a recipe: its latest job}, shared by all visitors


class Job:
    """Prepares and trains a recipe in the working folder. code: None while it runs, then the exit code."""

    def __init__(self, name):
        self.name, self.code, self.process = name, None, None
        self.output = tempfile.NamedTemporaryFile()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        code = 1
        try:
            for command in (f"data/{self.name}/prepare.py",), ("train.py", f"config/train_{self.name}.py"):
                command = [sys.executable, *(ROOT / file for file in command)]
                self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT)
                if code := self.process.wait():
                    break
        finally:
            self.code = code

    def lines(self):
        """The last lines of its output."""
        output = Path(self.output.name).read_text("utf-8", "replace")
        return output[-4000:].strip().splitlines() or ["starting ..."]

    def stop(self):
        """End it as Ctrl-C does: train.py saves and exits."""
        if self.process:
            self.process.terminate()


def start(name):
    """Start a recipe, unless it is running already."""
    if name not in jobs or jobs[name].code is not None:
        jobs[name] = Job(name)


def progress(lines):
    """The share of the steps that a run has done, by the lines that train.py prints."""
    steps = re.findall(r"step (\d+)/(\d+)", "\n".join(lines))
    return int(steps[-1][0]) / int(steps[-1][1]) if steps else 0.0


def mechanism_choices():
    """EXAMPLES and, with its default options, each other mechanism: a user's own."""
    known = {name for name, _ in EXAMPLES.values()}
    return EXAMPLES | {other: (other, {}) for other in mechanisms() if other not in known}


def word_count(tokenizer):
    """The number of entries of a vocabulary, without the document mark and the token of unknown words."""
    return len({tokenizer.token(i) for i in range(tokenizer.vocab_size) if i != tokenizer.mark} - {UNKNOWN})


def display_words(tokenizer, ids, text):
    """(words of a text's tokens, as typed; whether the model knows each; tokens of each)."""
    names, sizes = explain.split_words(tokenizer, ids)
    known, typed = [name != UNKNOWN for name in names], words(text)
    if tokenizer.kind == "words" and tokenizer.encode(" ".join(typed))[: len(ids) - 1] == ids[1:]:
        names = [names[0], *typed[: len(ids) - 1]]
    return [name if len(name) <= 60 else name[:60] + "…" for name in names], known, sizes


def shaded_html(words, known, method, scores):
    """Words as HTML on a ground that darkens with their scores, dotted below if the model does not know them."""
    spans = []
    for word, is_known, score, dark in zip(words, known, scores, explain.shades(method, scores)):
        note = f"{score:.1%} of the attention" if method == "attention" else f"log-odds {score:+.2f} due to this word"
        note += "" if is_known else f"; not in the vocabulary: read as {UNKNOWN}"
        colour = "230, 120, 0" if dark >= 0 else "40, 140, 230"
        look = f"background: rgba({colour}, {abs(dark):.3f}){'' if is_known else '; border-bottom: 2px dotted'}"
        spans.append(f'<span style="{look}" title="{html.escape(note)}">{html.escape(word)}</span>')
    return f'<style>{STYLE}</style><div class="shaded">{" ".join(spans)}</div>'


def option_comments(name):
    """{option: the comment beside it in the mechanism's file}."""
    source = (ROOT / f"{'attention' if name == 'dense' else name}.py").read_text("utf-8")
    return dict(re.findall(r"^(\w+) = .*?  # (.*)", source, re.M))


def score_lines(logs):
    """{score: [(step, value, "LABEL, SPLIT"), ...]} of {label: what `readers.read_log` returns}."""
    lines = {}
    for key in curves.SCORES:
        for label, (records, _) in logs.items():
            for record in records:
                if key in record:
                    lines.setdefault(key, []).append((record["step"], record[key], f"{label}, {record['split']}"))
    return lines


def health_text(record):
    """The scores of a record, and the means of its statistics, in words."""
    scores = {key: record[key] for key in (*curves.SCORES, "f1", "precision", "recall", "auc") if key in record}
    return format_scores(scores) + format_stats(record.get("stats", []))


def heat_map(matrix, words):
    """The Vega-Lite chart of attention weights (words, words); the weight below the pointer is shown as a number."""
    names = [f"{n} {word[:24]}" for n, word in enumerate(words)]
    cells = [{"word": r, "attends to": c, "weight": v} for r, row in zip(names, matrix) for c, v in zip(names, row)]
    axis = {"type": "nominal", "sort": names, "axis": {"labelLimit": 110, "labelOverlap": False, "labelAngle": 0}}
    colour = {"field": "weight", "type": "quantitative", "scale": {"scheme": "blues", "domainMin": 0}, "legend": None}
    encoding = {"x": {**axis, "field": "attends to", "axis": {**axis["axis"], "labelAngle": -60}},
                "y": {**axis, "field": "word"}, "color": colour}
    return {"data": {"values": cells}, "mark": {"type": "rect", "tooltip": {"content": "data"}}, "encoding": encoding,
            "width": "container", "height": 80 + 18 * len(names), "usermeta": {"embedOptions": {"actions": False}}}


def stream(model, tokenizer, device, prompt, stops, seed, *how):
    """(a dict with the text so far, an iterator that adds a token to it and yields True).

    stops: see `inference.Printer`. how: max_new_tokens, temperature, top_k, top_p of `GPT.generate_stream`. Raises
    UserError for a word that it does not know.
    """
    ids, block = inference.encode_prompt(tokenizer, prompt), model.config.block_size
    state = {"text": prompt if len(prompt) < 2000 else "…" + prompt[-2000:], "tokens": 0, "seconds": 0.0, "note": ""}
    if len(ids) > block:
        state["note"] = f"; the prompt is longer than the context: its last {block} tokens are read"
    idx, generator = torch.tensor([ids[-block:]], device=device), torch.Generator(device).manual_seed(seed)

    def draw():
        before, printer = time.perf_counter(), inference.Printer(tokenizer, prompt[-1:], stops)
        for token in hardware.adapt_threads(model.generate_stream(idx, *how, generator), device):
            state["text"] += printer([int(token)])
            state["tokens"] += 1
            state["seconds"] += time.perf_counter() - before
            if printer.ended:
                state["note"] += "; the text ended"
                return
            yield True
            before = time.perf_counter()  # the time between two calls is not this model's
        state["text"] += printer([], final=True)

    return state, draw()


_measuring = threading.Lock()  # measurements at the same time would slow each other


def time_attention(layers, T, device, dtype):
    """Seconds of forward + backward of each attention layer, without projections, on one text of T tokens: [float]."""
    shape = 4, 1, layers[0].n_head, T, layers[0].head_size
    q, k, v, grad = torch.randn(shape, device=device, dtype=hardware.DTYPES[dtype]).unbind(0)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]

    def train(layer):
        torch.autograd.grad(layer.attend(*inputs), inputs + layer.mask_parameters(), grad)

    with _measuring:
        costs = timing.side_by_side([lambda layer=layer: train(layer) for layer in layers], device, 7, 3.0)
    return [cost.seconds for cost in costs]
