"""Train a language model or a classifier: python train.py [config/x.py] [--key=value ...]

On many GPUs, or machines: torchrun --standalone --nproc_per_node=8 train.py [config/x.py] [--key=value ...]

A run is a folder: config.json, log.jsonl (one object a line), ckpt.pt (the last state, from which
--init_from=resume goes on), ckpt-previous.pt (the one before), best.pt (the weights that did best on validation).
"""

from core import startup  # first: torch reads its settings when it is loaded

import contextlib
import json
import math
import signal
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

STARTED = time.perf_counter()  # before torch is loaded, which takes seconds

import numpy as np
import torch

from core import dist, evaluation, hardware
from core.checkpoint import PREVIOUS, have_best, restore, save_all
from core.config import UserError, check_choice, configure, run_main
from core.dataset import DataChanged, Dataset, batches
from core.evaluation import health
from core.meta import difference
from core.runs import (Log, SaveError, Stop, asked, check_folder, clock, format_stats, install_signal_handlers, locked, mend_log,
                       prepare_folder, say, start_wandb, write_text, write_whole)
from core.stopwatch import Stopwatch
from model import GPTConfig, load, new_model, options_of

# ---- settings: every name here is a key of the command line and of config files ---------------

# the run
out_dir = "out"
init_from = "scratch"  # or 'resume': go on from out_dir/ckpt.pt; or 'auto': resume where that is there
seed = 1337  # of weights, dropout and the order of the data
on_save_error = "stop"  # where the disk is full, say; or 'warn': train on and try again at the next evaluation
eval_only = False  # evaluate out_dir's best.pt and leave
eval_test = False  # after training, open the test split, once, with the best weights
eval_interval = 175  # steps between evaluations, each with a checkpoint
eval_iters = 20  # batches of an evaluation while training, spread over the split; 0: the whole split
eval_train = False  # evaluate the training split as well, likewise: what has been learnt by heart
patience = 0  # stop after so many evaluations without a better one; 0: never
log_interval = 10
wandb_log = False
wandb_project = "attention"
wandb_run_name = ""  # default: out_dir

# the data
dataset = "stdlib"  # a folder, or NAME for data/NAME
task = ""  # 'lm': read a set of reviews as running text
batch_size = 8  # texts of one forward pass
gradient_accumulation_steps = 1  # forward passes of one step, which many ranks share

# the model: see GPTConfig in model.py
model = "gpt"
block_size = 256
n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0
bias = False
pos = "rope"
norm = "rmsnorm"
tie = True
pool = "mean"
attention = "dense"
kernel = "auto"

# the optimiser: AdamW
learning_rate = 2e-3  # small models bear more than nanoGPT's 6e-4
min_lr = 2e-4
max_iters = 350
warmup_iters = 35
decay_lr = True
lr_schedule = "cosine"  # or 'linear'
lr_decay_iters = 0  # steps until min_lr; 0: max_iters
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99  # small batches: average the second moment over more of them
grad_clip = 1.0  # largest norm of the gradient; 0: no limit

# the machine
device = "auto"
dtype = "auto"  # of products: 'float32', 'bfloat16' or 'float16'
shard = False  # FSDP: split the model over the ranks of torchrun, where it does not fit one
compile = False  # torch.compile: needs a C++ compiler on a CPU, and a while to start


def rate(step):
    """The learning rate of a step: linear warm-up, then cosine or linear decay to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    part = min(1.0, (step - warmup_iters) / max(1, (lr_decay_iters or max_iters) - warmup_iters))
    falling = 0.5 * (1 + math.cos(math.pi * part)) if lr_schedule == "cosine" else 1 - part
    return min_lr + falling * (learning_rate - min_lr)


def configure_optimizer(model):
    """AdamW; fused, it updates all weights in one pass."""
    groups = model.parameter_groups(weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)


def evaluate(model, data, split, count=0):
    """See evaluation.py."""
    return evaluation.evaluate(model, data, split, batch_size, device, dtype, count)


def to_device(*tensors):
    return [t if t is None else t.to(device, non_blocking=True) for t in tensors]


def check(settings):
    """Raise UserError for a value that no run can have."""
    if not out_dir:
        raise UserError("out_dir expects the path of a folder, got nothing")
    check_choice("init_from", init_from, ("scratch", "resume", "auto"))
    check_choice("on_save_error", on_save_error, ("stop", "warn"))
    check_choice("lr_schedule", lr_schedule, ("cosine", "linear"))
    at_least = dict.fromkeys(("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"), 1)
    at_least |= dict.fromkeys(("seed", "max_iters", "warmup_iters", "lr_decay_iters", "eval_iters", "patience",
                               "learning_rate", "min_lr", "weight_decay", "grad_clip", "beta1", "beta2"), 0)
    for key, least in at_least.items():
        if not settings[key] >= least:
            raise UserError(f"{key} must be at least {least}, got {settings[key]}")
    if seed >= 2**63:
        raise UserError(f"seed must be below 2**63, got {seed}")
    for key in ("beta1", "beta2"):
        if settings[key] >= 1:
            raise UserError(f"{key} must be below 1, got {settings[key]}")
    if not 0 <= dropout <= 1 - 2**-16:  # the engine draws 16 random bits
        raise UserError(f"dropout must be at least 0 and below 1 by 2**-16 or more, got {dropout}")
    if gradient_accumulation_steps > 10**6:
        raise UserError(f"gradient_accumulation_steps must be at most {10**6} forward passes, got {gradient_accumulation_steps}")
    if shard and dtype == "float16":
        raise UserError("shard=True knows no dtype=float16, whose scaler would have to watch all ranks: use bfloat16 or float32")
    parts = dist.pieces(gradient_accumulation_steps)[0]
    if parts > batch_size:
        raise UserError(f"{dist.world} ranks cannot share gradient_accumulation_steps={gradient_accumulation_steps} batches of "
                        f"batch_size={batch_size}: make one of the two larger, or take fewer ranks")


def check_size(data):
    """Raise UserError where weights, or the tokens of a batch, fill the memory by far: elsewhere the system would kill
    the process, or the machine stand still, without a word."""
    room, C = hardware.memory_size(device) * (dist.world if shard else 1), n_embd
    model_bytes = 16 * (12 * C * C * n_layer * (model == "gpt") + C * data.vocab_size)
    batch_bytes = batch_size * block_size * (16 + 4 * C) if data.kind == "lm" else 0
    for need, what in ((model_bytes, f"weights, gradients and AdamW of n_layer={n_layer}, n_embd={C}"),
                       (batch_bytes, f"a batch of batch_size={batch_size}, block_size={block_size}")):
        if need > room:
            raise UserError(f"{what} need {need / 2**30:,.0f} GiB at least; {device} has {room / 2**30:,.0f}: make them smaller")


def mechanism_options(settings):
    """The options of the chosen model and mechanism with their defaults."""
    return options_of(settings["model"], settings["attention"])


def build(data, settings, options):
    """(model, checkpoint or None): new, or as out_dir holds it, which then decides the model's shape."""
    if init_from == "scratch" and not eval_only:
        check_size(data)
        torch.manual_seed(seed)
        shape = {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
        config = GPTConfig(**shape, vocab_size=data.vocab_size, n_class=len(data.classes), options=options)
        return placed(new_model(config)), None
    # what changes no weight's shape follows the command line: of options, those that are not at their default
    free = {"kernel": kernel, "dropout": dropout}
    defaults = mechanism_options(settings)
    given = {key: value for key, value in options.items() if value != defaults[key]}
    path = Path(out_dir) / ("best.pt" if eval_only else "ckpt.pt")
    model, checkpoint = load(path, "cpu" if shard else device, given, **free)
    needed = {"settings", "state", "meta"} | (set() if eval_only else {"optimizer", "scaler", "random"})
    needed -= {"optimizer"} if "shards" in checkpoint else set()
    if missing := needed - checkpoint.keys():
        raise UserError(f"{path} holds no {', '.join(sorted(missing))}: expected what train.py saves as {path.name}; "
                        "it is another file, copied there: put the right one back")
    for key, value in {**settings, **given}.items():
        fixed = key not in free and key in checkpoint["model_config"]
        before = {**checkpoint["settings"], **checkpoint["model_config"], **checkpoint["model_config"]["options"]}.get(key, value)
        if before != value and key not in ("init_from", "eval_only", "eval_test", "out_dir", "device", "dtype"):
            print(f"checkpoint: {key} {'stays' if fixed else 'was'} {before!r}, {'not' if fixed else 'is now'} {value!r}")
    other = difference(checkpoint["meta"], data.meta)
    if not other and model.config.n_class != len(data.classes):
        other = f"classes: expected {model.config.n_class}, found {len(data.classes)}"
    if other:
        raise UserError(f"{out_dir} was trained on other data ({checkpoint['settings'].get('dataset')}) than {data.folder} holds "
                        f"({other}); give its dataset and task")
    fixed = {key: value for key, value in asdict(model.config).items() if key in settings}
    settings.update(fixed)
    globals().update(fixed)
    return placed(model), checkpoint


def placed(model):
    """The model where it is to compute: on this rank's device, or split over those of all ranks."""
    return dist.shard(model, device) if shard and dist.world > 1 else model.to(device)


def main(arguments=None):
    """Train as `arguments` say (default: the command line). Returns the exit code of a run that was stopped, else None."""
    global device, dtype, init_from
    began = STARTED if __name__ == "__main__" else time.perf_counter()
    settings, options = configure(globals(), arguments, mechanism_options)
    check(settings)
    hardware.keep_freed_memory()
    folder, data = Path(out_dir), Dataset(dataset, task)
    for split in ["val"] + ["test"] * eval_test + ["train"] * (not eval_only):
        batches(data, split, 1, block_size)  # refuses now what would otherwise be missed after hours
    with dist.joined(hardware.pick_device(device)) as device:
        if init_from == "auto" or init_from == "scratch" and dist.restarted(folder):
            init_from = "resume" if (folder / "ckpt.pt").exists() else "scratch"
        if init_from == "scratch" and not eval_only:
            dist.on_rank0(check_folder, folder)
        model, checkpoint = build(data, settings, options)
        if dist.local == 0:
            data.check_files()
        if dtype == "auto" and checkpoint and checkpoint.get("device") == device.split(":")[0]:
            dtype = checkpoint["dtype"]  # as it was, whatever this machine's other work makes of the rates now
        dtype = dist.gather(hardware.pick_dtype(dtype, device))[0]
        peak = dist.total(hardware.matmul_rate(device, dtype))
        kernels = {mechanism.choose_kernel(device) for mechanism in model.attentions()}
        print(f"{device} ({f'{dist.world} ranks, ' * (dist.world > 1)}{torch.get_num_threads()} threads), products in {dtype}: "
              f"{peak / 1e9:,.0f} GFLOP/s; {attention} attention{' by ' * bool(kernels)}{' and '.join(sorted(kernels))}")
        if eval_only:
            for split in ["val"] + ["test"] * eval_test:
                print(f"{split}: {say(evaluate(model, data, split)[0])}")
            return None
        with locked(folder) if dist.rank == 0 else contextlib.nullcontext():
            return fit(folder, data, model, checkpoint, settings, peak, began)


def fit(folder, data, model, checkpoint, settings, peak, began):
    """Train in a folder that is held; peak: the machine's rate of products, FLOP/s; began: when this process did, by
    time.perf_counter. Returns what `main` returns."""
    optimizer = configure_optimizer(model)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == "float16")
    state = {"step": 0, "evaluated": -1, "best": math.inf, "best_step": 0, "worse": 0, "seconds": 0.0, "work": 0.0}
    source = batches(data, "train", batch_size, block_size, seed)
    announce(model, *(t if t is None else t[:1] for t in source.batch(0)))
    if dist.rank:
        dist.seed(seed)  # each rank has dropout of its own
    if checkpoint:
        restore(folder / "ckpt.pt", checkpoint, state, model, optimizer, scaler, seed, device, dtype)
        have_best(folder / "best.pt", state)
        print(f"resume: from step {state['step']} of {max_iters}")
    options = model.config.options  # those of the checkpoint, where there is one
    wandb = start_wandb(wandb_project, wandb_run_name or out_dir, settings | options) if wandb_log and dist.rank == 0 else None

    def prepare():
        mend_log(folder / "log.jsonl", state["step"], state["evaluated"]) if checkpoint else prepare_folder(folder)
        write_text(folder / "config.json", json.dumps({
            "settings": settings, "options": options, "device": device, "dtype": dtype, "source": data.meta["source"],
            "parameters": model.parameter_count(), "machine": hardware.describe(), "ranks": dist.world,
            "launch": dist.launch_name()}, indent=1))

    dist.on_rank0(prepare)
    log, positions = Log(folder, wandb), Counter()  # tokens and padding read since the last `tally`, by the text's length

    def facts(**more):
        return {"model_config": asdict(model.config), "settings": settings, "source": data.meta["source"], "meta": data.meta,
                "state": state, "device": device.split(":")[0], "dtype": dtype, **more}

    def try_save(write, *arguments):
        """Write, by all ranks, and tell whether it was done; where it could not be, stop or go on as on_save_error says."""
        try:
            write(*arguments)
            return True
        except SaveError as error:
            if on_save_error == "stop" or state["step"] >= max_iters:
                raise
            log.say(f"step {state['step']}: {error}; training goes on, the next evaluation tries again")
            return False

    def save_last():
        tally()
        dist.on_rank0(log.flush, True)  # the checkpoint must not know of a step that the log lacks
        state["seconds"] = watch.seconds()
        more = facts(scaler=scaler.state_dict(), random=dist.gather(hardware.random_state(device)))
        save_all(folder / "ckpt.pt", more, model, optimizer, PREVIOUS)

    def check_finite(value, name):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {state['step']}: stopped; what is saved in {folder} is from before; "
                            "try a lower learning_rate, a smaller grad_clip or dtype=float32")

    def tally():
        """Count the work done since the last time into state["work"], FLOP."""
        done = sum(n * model.estimate_flops(T) for T, n in positions.items())
        positions.clear()
        state["work"] += dist.total(done)

    def validate():
        """Validation, the log's line of it, and the checkpoints."""
        tally()
        result, _ = evaluate(model, data, "val", eval_iters)
        check_finite(result["loss"], "the validation loss")
        if eval_train:
            result |= {f"train_{name}": score for name, score in evaluate(model, data, "train", eval_iters)[0].items()}
        score = -result["accuracy"] if data.kind == "classify" else result["loss"]
        better, before = score < state["best"], {key: state[key] for key in ("best", "best_step")}
        state.update({"best": score, "best_step": state["step"], "worse": 0} if better else {"worse": state["worse"] + 1})
        state["evaluated"] = state["step"]
        record = {"step": state["step"], "split": "val", **result, **health(model), "work": state["work"]}
        text = f"step {state['step']}: val {say(result)}{format_stats(record['stats'])}{' *' if better else ''}"
        try_save(dist.on_rank0, log, record, text, True)
        if better and not try_save(save_all, folder / "best.pt", facts(), model):
            state.update(before)  # the best is what best.pt holds
        try_save(save_last)

    forward = dist.synchronised(model, hardware.compiled(model) if compile else model)
    model.train()
    install_signal_handlers()
    began -= state["seconds"]  # of the processes that it resumes from
    per_evaluation, at_the_end = evaluated_batches(data)
    explain_log(data, per_evaluation)
    watch, tokens, work, logged, total = Stopwatch(state["seconds"]), 0, state["work"], state["step"], 0.0
    random = None  # within a step: the random stream as it was at its beginning
    try:
        while True:
            dist.leave_if_asked()
            step = state["step"]
            if (step % eval_interval == 0 or step >= max_iters) and state["evaluated"] != step:
                with watch.evaluating(per_evaluation):
                    validate()
            if patience and state["worse"] >= patience:
                print(f"\nno better validation in {patience} evaluations: stopped")
                break
            if step >= max_iters:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            random = hardware.random_state(device)
            total, norm, read = gradients(model, forward, source, step, scaler, optimizer, positions)
            tokens += read
            if step % log_interval == 0 or device == "cpu":  # elsewhere a look at each step would make the device wait
                check_finite(float(total), "the training loss")
                if dtype != "float16":  # whose scaler skips such steps
                    check_finite(float(norm), "the norm of the gradient")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state["step"], random = step + 1, None
            if step % log_interval == 0:
                seconds = watch.lap(step + 1 - logged)
                tally()
                speed, share = dist.total(tokens) / seconds, (state["work"] - work) / seconds / peak
                tokens, work, logged, state["seconds"] = 0, state["work"], step + 1, watch.seconds()
                evaluations = (max_iters - 1) // eval_interval - step // eval_interval + 1
                left = watch.left(max_iters - step - 1, evaluations * per_evaluation + at_the_end)
                record = {"step": step, "split": "train", "loss": float(total), "lr": rate(step), "grad_norm": float(norm),
                          "tokens_per_second": speed, "matmul_share": share, "seconds": state["seconds"]}
                text = f"step {step}/{max_iters}: loss {record['loss']:.4f}, {speed:,.0f} tokens/s, {share:.0%} of the matmul rate"
                try_save(dist.on_rank0, log, record, text + ("" if left is None else f", {clock(left)} left"))
        state["seconds"] = watch.seconds()
        finish(data, folder, log, state, began)
    except (Stop, DataChanged) as reason:
        check_finite(float(total), "the training loss")
        if random:  # what was done of a step is done again
            hardware.set_random_state(device, random)
        save_last()
        if isinstance(reason, DataChanged):
            raise UserError(f"{reason}; stopped at step {state['step']}, saved: then go on with --init_from=resume")
        print(f"\nstopped at step {state['step']}, saved; go on with --init_from=resume")
        return 128 + (asked[0] if asked else signal.SIGTERM)  # which another rank was sent


def gradients(model, forward, source, step, scaler, optimizer, positions):
    """The gradients of one step, clipped: (loss, their norm before that, tokens read).

    forward: the model, or what torch.compile made of it. positions: a Counter to which the tokens and the padding that
    were read are added, by the length of the texts. Raises Stop and DataChanged between the forward passes.
    """
    total, tokens, widths = torch.zeros((), device=device), 0, Counter()
    parts, own = dist.pieces(gradient_accumulation_steps)
    for micro, part in own:
        which = step * gradient_accumulation_steps + micro, part, parts
        batch = dist.together(source.batch, *which)
        x, y, lengths = to_device(*batch)
        with dist.piece(model, forward, last=(micro, part) == own[-1]):
            with hardware.autocast(device, dtype):
                loss = forward(x, y, lengths)[1] * source.share(*which) / gradient_accumulation_steps
            total += loss.detach()
            # gradients become the mean over ranks, and so the sum of their losses
            scaler.scale(dist.world * loss + model.penalty() / len(own)).backward()
        tokens += x.numel() if lengths is None else int(batch[2].sum())
        widths[x.size(1)] += x.numel()
    positions.update(widths)
    scaler.unscale_(optimizer)
    dist.mean_of_whole(model)
    return dist.all_reduce(total), dist.clip(model.parameters(), grad_clip or math.inf), tokens


def announce(model, x, y, lengths):
    """Print what the model costs; x, y, lengths: one example, whose activations are counted where the model is whole."""
    N, T, words = model.parameter_count(), x.size(1), ""
    if not dist.is_sharded(model):
        with hardware.autocast(device, dtype):
            activations = hardware.activation_bytes(model, *to_device(x, y, lengths)) * batch_size
            activations /= dist.pieces(gradient_accumulation_steps)[0]
        words = f", {activations / 2**20:,.0f} MiB of activations in a forward pass"
    print(f"{N:,} parameters, {model.estimate_flops(T) / 1e6:,.1f} MFLOP to train on a token of {T}, {16 * N / 2**20:,.0f} MiB "
          f"of weights, gradients and AdamW{words}")


def evaluated_batches(data):
    """(batches of one evaluation while training, batches of those of `finish`)."""
    count = {split: len(batches(data, split, batch_size, block_size).groups())
             for split in ["val"] + ["train"] * eval_train + ["test"] * eval_test}
    during = sum(min(eval_iters or count[split], count[split]) for split in ["val"] + ["train"] * eval_train)
    return during, count["val"] + count.get("test", 0)


def explain_log(data, count):
    """Print what the numbers of the lines to come are; count: batches of an evaluation while training."""
    unit = "text" if data.kind == "classify" else "token"
    print(f"A line every {log_interval} steps: the step, of all; the loss of its batch in nats per {unit}; tokens per second of "
          "training since the line before, without evaluations; the operations that they need, as a share of the rate of matrix "
          "products above; the time left, with evaluations")
    print(f"A line every {eval_interval} steps: the scores of {count} batches, then the attention's statistics, means over layers "
          "and heads; * marks the best so far, which best.pt holds")


def finish(data, folder, log, state, began):
    """The scores that count: of the best weights, over whole splits; the test split only on request. began: see `fit`, or
    before that by the seconds of the processes that this one resumes from."""
    best = placed(load(folder / "best.pt", "cpu" if shard else device)[0])
    for split in ["val"] + ["test"] * eval_test:
        result, p = evaluate(best, data, split)
        if p is not None:
            label = data.texts(split)[2]
            dist.on_rank0(write_whole, folder / f"predictions-{split}.npz", lambda file: np.savez(file, p=p, label=label))
        cost = {"seconds": state["seconds"], "work": state["work"]}
        dist.on_rank0(log, {"step": state["best_step"], "split": split, "whole": True, **result, **health(best), **cost},
                         f"best weights (step {state['best_step']}), whole {split} split: {say(result)}", True)
    print(f"{clock(time.perf_counter() - began)} in all; sample with: python sample.py --out_dir={folder}")


if __name__ == "__main__":
    run_main(main)
