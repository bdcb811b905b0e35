"""Which is better, under one budget, over several seeds: python compare.py config/compare_x.py [--key=value ...]

Trains each of `variants` with each of `seeds` by train.py's own loop, with the same order of the data, and
writes into out_dir a folder for each run, results.jsonl (a line a run) and, at `results`, the comparison as FILE.json,
a table (FILE.md) and a picture (FILE.png). Stopped at any moment and started again, it goes on and runs nothing twice.

What a step takes is measured first, all variants side by side, and kept in out_dir/speeds.json: minutes are steps
times that, and no run is judged by what else the machine did meanwhile.

All variants read the same data and are scored on the same split. A config file in `base` is a recipe for one run: its
length, seed, warm-up, evaluations and out_dir are replaced by those of the comparison. With --init_from=FOLDER a run
begins with those weights. Other files in out_dir stay.
"""

from core import startup  # first: torch reads its settings when it is loaded

import json
import runpy
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import train
from core import ROOT, charts, dist, hardware, timing
from core.checkpoint import PREVIOUS
from core.config import UserError, check_choice, configure, plain_values, run_main
from core.dataset import Dataset, batches
from core.launch import check_size
from core.meta import difference
from core.model_config import ABSOLUTE
from core.optimizers import adamw
from core.readers import is_number
from core.report import summarize, table
from core.results import (continue_prompts, hard_reviews, is_result, judge_hard, read_if_same,
                          read_right_answers, read_scores)
from core.runs import Stop, asked, check_folder, clock, locked, write_text
from core.tokenizer import Tokenizer
from core.warm_start import WarmStart
from model import GPTConfig, load, new_model

TRAIN = plain_values(vars(train))  # its defaults

out_dir = "out-compare"
results = ""  # where FILE.json, FILE.md and FILE.png go, without the ending; default: out_dir/comparison
title = ""
base = []  # arguments of train.py for all: config files and --key=value
variants = []  # "NAME: --key=value ...": what each adds; the first is what the others are held against
seeds = [1, 2, 3, 4, 5, 6]
budget = "steps"  # what every run gets the same of: 'steps', 'seconds' of training, or 'work', in 1e12 operations
amount = 0.0  # of that
warmup = 0.05  # share of the steps in which the learning rate rises
evaluations = 10  # of the validation split in a run, evenly spaced, besides the one at its beginning
hard = ""  # of classifiers: a file of {"text", "label", "kind"} lines that are judged as well, by kind
prompts = []  # of language models: what is likeliest to come next is told
resamples = 2000  # of the bootstrap

SHARED = ("eval_test", "eval_train", "device", "dtype")  # settings without which scores or times are not comparable
INSTEAD = {  # arguments of train.py that the comparison sets, and what to do instead of giving them
    "--seed": "give seeds of compare.py", "--max_iters": "give budget and amount of compare.py",
    "--warmup_iters": "give warmup of compare.py, a share of the steps",
    "--eval_interval": "give evaluations of compare.py", "--out_dir": "give out_dir of compare.py",
    "--eval_only": "leave it out: a comparison trains every run", "--help": "see python train.py --help",
    "-h": "see python train.py --help"}


class Variant(NamedTuple):
    """What is compared: a model with its mechanism."""

    name: str
    arguments: list  # of train.py
    settings: dict
    options: dict
    warm_start: dict | None  # the checkpoint that a run begins with, as in its config.json


def parse(text):
    """The `Variant` of a text like 'local: --attention=sparse --window=64'. Raises UserError for what it cannot
    have."""
    name, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not colon or not name.strip():
        raise UserError(f"variants: expected texts like 'local: --attention=sparse --window=64', got {text!r}")
    try:
        arguments = [*base, *shlex.split(rest)]
    except ValueError as error:
        raise UserError(f"variants: cannot split {text!r} into arguments ({error}); close the quotation or leave it "
                        "out")
    for key in (argument.partition("=")[0] for argument in arguments):
        if key in INSTEAD:
            raise UserError(f"variant {name.strip()!r}: {key} cannot be given in base or variants; {INSTEAD[key]}")
    warm = WarmStart(GPTConfig)
    settings, options = configure(dict(TRAIN), [*arguments, "--eval_only=False"], train.mechanism_options, warm.inherit)
    if (init_from := settings["init_from"]) in ("resume", "auto"):
        raise UserError(f"variant {name.strip()!r}: leave out --init_from={init_from}; a comparison goes on by itself")
    return Variant(name.strip(), arguments, settings, options, warm.origin.get("warm_start"))


def slug(name):
    """A name as part of a folder's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def folder_of(name, seed):
    return Path(out_dir) / f"{slug(name)}-{seed}"


# ---- what a variant costs ----------------------------------------------------------------------


def set_up(variant, device):
    """(model, its source of batches), as in a run of the variant."""
    settings = SimpleNamespace(**variant.settings)
    data = Dataset(settings.dataset, settings.task)
    check_size(variant.settings, data, device)
    torch.manual_seed(settings.seed)
    model = new_model(train.model_config(variant.settings, dict(variant.options), data)).to(device)
    return model.train(), batches(data, "train", settings.batch_size, settings.block_size)


def typical_steps(variant, device, dtype):
    """(a call that trains for five steps, from one with short texts to one with long ones; FLOP of a mean step,
    parameters)."""
    model, source = set_up(variant, device)
    net, passes = dist.wrap(model, variant.settings["compile"]), variant.settings["gradient_accumulation_steps"]
    optimizer = adamw(model.parameter_groups(0.0), lr=0.0)  # the weights stay as they are
    texts = [source.batch(step)[0] for step in range(50)]
    work = sum(x.numel() * model.estimate_flops(x.size(1)) for x in texts) / len(texts) * passes
    chosen = sorted(range(len(texts)), key=lambda step: texts[step].size(1))[5::10]

    def micro_batches(step):
        for micro in range(passes):
            batch = source.batch(step * passes + micro)
            yield *(t if t is None else t.to(device) for t in batch), 1 / passes

    def call():
        for step in chosen:
            timing.training_step(model, net, optimizer, micro_batches(step), device, dtype)

    return call, work, model.parameter_count()


def measure(variants, device, dtype):
    """{name: what it costs}: seconds of a step, all variants side by side, FLOP of a step, parameters."""
    calls, works, counts = zip(*(typical_steps(variant, device, dtype) for variant in variants))
    costs = timing.side_by_side(calls, device, 9, budget=120)
    return {variant.name: {"seconds_per_step": cost.seconds / 5, "work_per_step": work, "parameters": count}
            for variant, cost, work, count in zip(variants, costs, works, counts)}


def costs_of(variants):
    """`measure`, or what it found before for the same variants."""
    path, of = Path(out_dir) / "speeds.json", [variant._asdict() for variant in variants]
    try:
        saved = json.loads(path.read_text("utf-8"))
        numbers = [saved["costs"][v.name][key] for v in variants
                   for key in ("seconds_per_step", "work_per_step", "parameters")]
        if saved["variants"] == of and all(is_number(x) and x > 0 for x in numbers):
            return saved["costs"], saved["machine"], saved["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print(f"measuring a step of {len(variants)} variants, side by side ...", flush=True)
    device = hardware.pick_device(variants[0].settings["device"])
    dtype = hardware.pick_dtype(variants[0].settings["dtype"], device)
    costs, machine = measure(variants, device, dtype), hardware.describe()
    write_text(path, json.dumps({"variants": of, "costs": costs, "machine": machine, "dtype": dtype}, indent=1))
    return costs, machine, dtype


def steps_of(cost):
    """The steps that the budget buys. Raises UserError where no run can have so many."""
    price = {"steps": 1, "seconds": cost["seconds_per_step"], "work": cost["work_per_step"] / 1e12}[budget]
    if amount / price >= 2**53:
        raise UserError(f"amount={amount:g} {budget} would be {amount / price:g} steps; make it smaller")
    return max(1, round(amount / price))


# ---- the runs ----------------------------------------------------------------------------------


def plan(variant, seed, steps):
    """(folder, arguments, settings) of a run, the settings as its folder tells them, and its warm start."""
    folder = folder_of(variant.name, seed)
    changes = {"seed": seed, "max_iters": steps, "warmup_iters": round(warmup * steps),
               "eval_interval": max(1, steps // evaluations), "out_dir": str(folder), "eval_only": False}
    arguments = [*variant.arguments, *(f"--{key}={value}" for key, value in changes.items())]
    wanted = {**variant.settings, **changes, **variant.options, "warm_start": variant.warm_start}
    del wanted["init_from"]  # which differs where a run was resumed
    return folder, arguments, wanted


def result_of(variant, seed, steps):
    """The result of a finished run as a dict, else None. Where its result.json is missing, damaged or without an answer
    to `hard` or `prompts`, it is read again from the run's log and weights."""
    folder, _, wanted = plan(variant, seed, steps)
    result = read_if_same(folder / "result.json", wanted)
    if result and is_result(result, folder, wanted, hard, prompts):
        return {**result, "variant": variant.name, "seed": seed, "steps": steps}
    try:
        return read_result(variant, seed, steps)
    except UserError:  # not finished, or not readable
        return None


def run_training(arguments):
    """Run train.py as `python train.py ARGUMENTS` does, with global names of its own, in this process. Returns its exit
    code, None or 0 for a finished run."""
    line, sys.argv = sys.argv, ["train.py", *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = line


def train_one(variant, seed, steps):
    """Train one run, or the rest of it, and return its result. Raises Stop where the user stops it."""
    folder, arguments, wanted = plan(variant, seed, steps)
    resume = (folder / "ckpt.pt").exists() and read_if_same(folder / "config.json", wanted)
    code = run_training([*arguments, *["--init_from=resume"] * bool(resume)])
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stop
    if code:  # train.py has printed why
        sys.exit(code)
    return read_result(variant, seed, steps)


def read_result(variant, seed, steps):
    """Read the result of a finished run from its folder, write result.json and return it as a dict.

    Raises UserError where the run is of other settings, not finished, or its files are damaged.
    """
    folder, _, wanted = plan(variant, seed, steps)
    saved = read_if_same(folder / "config.json", wanted)
    if not saved:
        raise UserError(f"{folder} holds no run with the settings of {variant.name!r}, seed {seed}")
    result = {"variant": variant.name, "seed": seed, "steps": steps,
              **read_run(variant, folder, saved.get("dtype", "float32")),
              "settings": saved["settings"], "options": saved["options"], "warm_start": variant.warm_start}
    if not is_result(result, folder, wanted, hard, prompts):
        raise UserError(f"{folder} holds a run that is not finished, or its log.jsonl is damaged")
    write_text(folder / "result.json", json.dumps(result))
    for name in (PREVIOUS, "ckpt.pt"):  # the run's last states; best.pt stays
        (folder / name).unlink(missing_ok=True)
    return result


def read_run(variant, folder, dtype):
    """Scores, curves and costs of a run, with answers to `hard` and `prompts` by best.pt."""
    result, device = read_scores(folder), hardware.pick_device(variant.settings["device"])
    if hard or prompts:
        model, checkpoint = load(folder / "best.pt", device)
        tokenizer = Tokenizer(checkpoint["meta"])
        if hard:
            result["hard"] = judge_hard(model, tokenizer, hard, device, dtype)
        else:
            result["next"] = continue_prompts(model, tokenizer, prompts, device)
    return result


def right_answers(result):
    """Whether each text of the split that was judged is classified correctly, (N,)."""
    return read_right_answers(folder_of(result["variant"], result["seed"]))


# ---- the script --------------------------------------------------------------------------------


def check():
    """Raise UserError for settings that no comparison can have."""
    check_choice("budget", budget, ("steps", "seconds", "work"))
    if amount <= 0:
        raise UserError(f"amount must be above 0, how many {budget} a run gets; got {amount}")
    if not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds) or not 2 <= len(seeds) == len(set(seeds)):
        raise UserError(f"seeds: expected at least two different whole numbers, got {seeds}")
    if len(variants) < 2 or len({slug(str(text).partition(":")[0]) for text in variants}) < len(variants):
        raise UserError(f"variants: expected at least two of different names, got {variants}")
    if evaluations < 1 or resamples < 100 or not 0 <= warmup < 1:
        raise UserError("expected evaluations >= 1, resamples >= 100 and 0 <= warmup < 1, got "
                        f"{evaluations}, {resamples}, {warmup}")
    for key, values in (("base", base), ("prompts", prompts)):
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{key}: expected texts, got {values}")
    if results and not Path(results).name:
        raise UserError(f"results: expected the name of a file without its ending, got {results!r}")


def check_variants(chosen):
    """Raise UserError for variants that no comparison can have, and for `hard` and `prompts` that they cannot
    answer."""
    first, data = chosen[0], None
    for variant in chosen:
        for key in SHARED:
            if (here := variant.settings[key]) != (there := first.settings[key]):
                raise UserError(f"variants must have the same {key}: {first.name!r} has {there!r}, {variant.name!r} "
                                f"has {here!r}; give it in base")
        train.check(variant.settings)
        own = Dataset(variant.settings["dataset"], variant.settings["task"])
        for split in ["train", "val"] + ["test"] * variant.settings["eval_test"]:
            batches(own, split, 1, variant.settings["block_size"])
        data = data or own
        unlike = difference(data.meta, own.meta)
        if not unlike and data.splits.get("test") != own.splits.get("test"):
            unlike = "their test splits"
        if unlike or own.kind != data.kind:
            raise UserError(f"variants must share their data: {first.name!r} reads {data.folder} (task {data.kind}), "
                            f"{variant.name!r} reads {own.folder} (task {own.kind}){f' ({unlike})' * bool(unlike)}; "
                            "give dataset and task in base")
    if hard and data.kind != "classify":
        raise UserError(f"hard is for classifiers; {data.folder} is read as running text: leave it out")
    if prompts and data.kind != "lm":
        raise UserError(f"prompts are for language models; {data.folder} holds texts to classify: leave them out, "
                        "or give --task=lm in base")
    for key, texts in (("hard", [row["text"] for row in hard_reviews(hard, data.classes)] if hard else []),
                       ("prompts", prompts)):
        for text in texts:
            check_text(key, text, data.tokenizer, chosen)


def check_text(key, text, tokenizer, chosen):
    """Raise UserError where the text cannot be read with the tokenizer, or is too long a prompt for a variant."""
    try:
        length = len(tokenizer.encode(text)) + (tokenizer.mark is not None)
    except ValueError as error:
        raise UserError(f"{key}: {error}")
    if not length:
        raise UserError(f"{key}: expected texts that hold a token, got {text!r}")
    for settings in (variant.settings for variant in chosen if key == "prompts"):
        if settings["pos"] in ABSOLUTE and length > settings["block_size"]:
            raise UserError(f"prompts: {text[:60]!r} has {length} tokens; pos={settings['pos']} knows "
                            f"{settings['block_size']} positions (block_size)")


def draw(path):
    """The picture of a comparison's JSON file, where matplotlib is there."""
    try:
        charts.draw_comparison(path)
    except UserError as error:  # the table alone is worth having
        print(f"no picture: {error}")


def main():
    configure(globals())
    check()
    hardware.keep_freed_memory()
    chosen = [parse(text) for text in variants]
    check_variants(chosen)
    with locked(Path(out_dir)):
        return run_all(chosen)


def run_all(chosen):
    """Train and compare the variants. Returns the exit code where it was stopped, else None."""
    path = Path(results or Path(out_dir) / "comparison")
    path.parent.mkdir(parents=True, exist_ok=True)  # refused now rather than after the runs
    costs, machine, dtype = costs_of(chosen)
    # in the precision that was measured: another look at a busy machine may choose another
    chosen = [variant._replace(arguments=[*variant.arguments, f"--dtype={dtype}"],
                               settings=variant.settings | {"dtype": dtype}) for variant in chosen]
    todo = [(variant, seed, steps_of(costs[variant.name])) for seed in seeds for variant in chosen]
    seconds = [steps * costs[variant.name]["seconds_per_step"] for variant, _, steps in todo]
    for run in todo:
        if not result_of(*run) and not ((folder := plan(*run)[0]) / "ckpt.pt").exists():
            check_folder(folder)  # train.py would refuse it, after other runs
    found, ratio = [], 1.0  # how much longer a run takes than its steps: evaluations, and what else the machine does
    try:
        for n, (variant, seed, steps) in enumerate(todo):
            result = result_of(variant, seed, steps)
            if not result:
                waiting = sum(s for s, (v, *how) in zip(seconds[n:], todo[n:]) if not result_of(v, *how))
                print(f"\nrun {n + 1} of {len(todo)}: {variant.name}, seed {seed}, {steps:,} steps; "
                      f"about {clock(ratio * waiting)} left in all", flush=True)
                result = train_one(variant, seed, steps)
            found.append(result)
            ratio = sum(r["seconds"] for r in found) / sum(seconds[: n + 1])
            write_text(Path(out_dir) / "results.jsonl", "".join(json.dumps(result) + "\n" for result in found))
            dist.leave_if_asked()
    except Stop:
        print(f"\nstopped with {len(found)} of {len(todo)} runs done; start it again to go on")
        return 128 + asked[0]
    by_name = {variant.name: [r for r in found if r["variant"] == variant.name] for variant in chosen}
    compared = summarize(by_name, costs, right_answers, resamples)
    for row, variant in zip(compared["variants"], chosen):
        row["block_size"] = variant.settings["block_size"]
    summary = {"compare": path.name, "title": title or path.name, "budget": budget, "amount": amount,
               "dataset": chosen[0].settings["dataset"], "seeds": seeds, "machine": machine, "dtype": dtype,
               "command": shlex.join(["python", "compare.py", *sys.argv[1:]]), **compared,
               "runs": [{key: value for key, value in r.items() if key not in ("settings", "options")} for r in found]}
    write_text(path.with_name(path.name + ".json"), json.dumps(summary))
    write_text(path.with_name(path.name + ".md"), table(summary))
    print("\n" + table(summary))
    draw(path.with_name(path.name + ".json"))


if __name__ == "__main__":
    run_main(main)
