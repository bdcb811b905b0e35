"""A training run: what makes the loop of train.py safe. Its folder, log, checkpoints, signals, checks and progress."""

import contextlib
import json
import math
import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from core import dist, hardware
from core.checkpoint import PREVIOUS, check_best, restore, save_all
from core.config import UserError
from core.dataset import DataChanged
from core.evaluation import evaluate, health
from core.launch import (count_evaluation_batches, explain_log, open_data, print_changes, print_costs,
                         print_machine)
from core.meta import difference
from core.model_config import OF_THE_RUN
from core.runs import (Log, SaveError, Stop, asked, check_folder, clock, format_lengths, format_scores, format_stats,
                       install_signal_handlers, locked, mend_log, prepare_folder, start_wandb, write_text, write_whole)
from core.stopwatch import Stopwatch


class Run:
    """One training run in its folder, used as a context manager: SIGINT, SIGTERM and changed data end it saved.

    settings: train.py's, a dict, in which a checkpoint's model replaces the given one; options: the mechanism's;
    load: model.load; began: time.perf_counter() at the start of the process; warm: a `warm_start.WarmStart`.
    Raises UserError for data that cannot be read and for a folder that holds something else.
    """

    def __init__(self, settings, options, device, load, began, warm):
        self.settings, self.options, self.device, self.load, self.began = settings, options, device, load, began
        self.given = SimpleNamespace(**settings)
        self.folder, self.data = Path(self.given.out_dir), open_data(self.given)
        self.state = {"step": 0, "evaluated": -1, "best": math.inf, "best_step": 0, "worse": 0, "seconds": 0.0,
                      "work": 0.0}
        self.checkpoint = self.watch = self.exit_code = None
        self.warm, self.origin = warm, warm.origin  # origin: what config.json and checkpoints hold of a warm start
        self.exits = contextlib.ExitStack()
        self.tokens, self.read = 0, Counter()  # since the last log_step; {length: tokens and padding} since tally
        self.last_loss = 0.0
        hardware.keep_freed_memory()
        init_from = self.given.init_from
        if init_from == "auto" or init_from != "resume" and dist.restarted(self.folder):
            init_from = "resume" if (self.folder / "ckpt.pt").exists() else "scratch"
        self.is_new = init_from != "resume" and not self.given.eval_only
        if self.is_new:
            dist.on_rank0(check_folder, self.folder)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with self.exits:
            if self.watch is None or not isinstance(error, (Stop, DataChanged)):
                return False
            self.raise_if_not_finite(float(self.last_loss), "the training loss")
            self.save_last()  # with the random stream from the start of this step, which is repeated
            if isinstance(error, DataChanged):
                raise UserError(f"{error}; stopped at step {self.state['step']}, saved: then go on with "
                                "--init_from=resume")
            print(f"\nstopped at step {self.state['step']}, saved; go on with --init_from=resume")
            self.exit_code = 128 + (asked[0] if asked else signal.SIGTERM)  # which another rank received
            return True

    # ---- before the loop -------------------------------------------------------------------

    def load_model(self, defaults):
        """The model that out_dir holds. The fields `OF_THE_RUN` and those options that change no weight's shape follow
        the command line; the rest stays. defaults: of the options. Raises UserError if the model does not fit the
        data."""
        free = {name: getattr(self.given, name) for name in OF_THE_RUN}
        changed = {key: value for key, value in self.options.items() if value != defaults[key]}
        path = self.folder / ("best.pt" if self.given.eval_only else "ckpt.pt")
        model, checkpoint = self.load(path, "cpu" if self.given.shard else self.device, changed, **free)
        needed = {"settings", "state", "meta"} | (set() if self.given.eval_only else {"optimizer", "random"})
        needed -= {"optimizer"} if "shards" in checkpoint else set()
        if missing := needed - checkpoint.keys():
            raise UserError(f"{path} holds no {', '.join(sorted(missing))}: expected what train.py saves as "
                            f"{path.name}; it is another file, copied there: put the right one back")
        print_changes(checkpoint, {**self.settings, **changed}, free)
        other = difference(checkpoint["meta"], self.data.meta)
        if not other and model.config.n_class != len(self.data.classes):
            other = f"classes: expected {model.config.n_class}, found {len(self.data.classes)}"
        if other:
            raise UserError(f"{self.folder} was trained on other data ({checkpoint['settings'].get('dataset')}) than "
                            f"{self.data.folder} holds ({other}); give its dataset and task")
        self.settings.update({key: value for key, value in asdict(model.config).items() if key in self.settings})
        self.checkpoint, self.origin = checkpoint, {k: v for k, v in checkpoint.items() if k == "warm_start"}
        return self.place(model)

    def place(self, model):
        """The model on this rank's device, or sharded over all ranks."""
        return dist.shard(model, self.device) if self.given.shard and dist.world > 1 else model.to(self.device)

    def choose_precision(self, model):
        """Set `dtype`, print what the run computes on and how, and return the context of forward passes in this
        dtype."""
        if dist.local_rank == 0:
            self.data.check_files()
        dtype, saved = self.given.dtype, self.checkpoint or {}
        if dtype == "auto" and saved.get("device") == self.device.split(":")[0] and saved["dtype"] != "float16":
            dtype = saved["dtype"]  # a measurement at another time may choose another one
        self.dtype = dist.all_gather(hardware.pick_dtype(dtype, self.device))[0]
        self.peak = dist.sum_over_ranks(hardware.matmul_rate(self.device, self.dtype))  # FLOP/s of matrix products
        print_machine(model, self.device, self.dtype, self.peak)
        return hardware.autocast(self.device, self.dtype)

    def print_scores(self, model):
        """Print the scores of whole splits, for eval_only."""
        for split in ["val"] + ["test"] * self.given.eval_test:
            scores, _ = evaluate(model, self.data, split, self.given.batch_size, self.device, self.dtype)
            print(f"{split}: {format_scores(scores)}{format_lengths(scores)}")

    def restore(self, model, optimizer, source):
        """Lock and prepare the folder. If the run is resumed, restore optimiser, random stream and state.

        source: the batches of the training split.
        """
        if dist.rank == 0:
            self.exits.enter_context(locked(self.folder))
        self.model, self.optimizer = model, optimizer
        example = self.to_device(*(t if t is None else t[:1] for t in source.batch(0)))
        print_costs(model, example, self.given, self.device, self.dtype)
        if dist.rank:
            dist.seed(self.given.seed)  # each rank needs its own dropout
        if self.checkpoint:
            path, seed = self.folder / "ckpt.pt", self.given.seed
            restore(path, self.checkpoint, self.state, model, optimizer, seed, self.device, self.dtype)
            check_best(self.folder / "best.pt", self.state)
            print(f"resume: from step {self.state['step']} of {self.given.max_iters}")
        settings, wandb = self.settings | model.config.options, None
        if self.given.wandb_log and dist.rank == 0:
            wandb = start_wandb(self.given.wandb_project, self.given.wandb_run_name or self.given.out_dir, settings)
        self.log = Log(self.folder, wandb)
        dist.on_rank0(self.prepare_folder)
        self.checkpoint = None  # frees its memory
        model.train()

    def prepare_folder(self):
        if self.checkpoint:
            mend_log(self.folder / "log.jsonl", self.state["step"], self.state["evaluated"])
        else:
            prepare_folder(self.folder)
        write_text(self.folder / "config.json", json.dumps({
            "settings": self.settings, "options": self.model.config.options, "device": self.device, "dtype": self.dtype,
            "source": self.data.meta["source"], "parameters": self.model.parameter_count(),
            "machine": hardware.describe(), "ranks": dist.world, "launch": dist.launch_name(), **self.origin,
        }, indent=1))

    # ---- the loop --------------------------------------------------------------------------

    def steps(self):
        """Yield the number of the next step until the loop is left; raises Stop after a signal. A checkpoint holds the
        random stream from the start of its step, whatever the step has drawn since."""
        install_signal_handlers()
        self.began -= self.state["seconds"]  # of earlier processes
        block_size = self.model.config.block_size
        self.per_evaluation, self.at_the_end = count_evaluation_batches(self.data, self.given, block_size)
        explain_log(self.given, self.data, self.per_evaluation)
        self.watch, self.logged = Stopwatch(self.state["seconds"]), (self.state["step"], self.state["work"])
        while True:
            self.random = hardware.random_state(self.device)
            dist.leave_if_asked()
            yield self.state["step"]
            self.state["step"] += 1

    def micro_batches(self, net, source, step):
        """Yield (x, y, lengths, share) on the device; see `dist.micro_batches`. Counts the tokens of the step."""
        tokens, read = 0, Counter()
        for x, y, lengths, share in dist.micro_batches(net, source, step, self.given.gradient_accumulation_steps):
            tokens += x.numel() if lengths is None else int(lengths.sum())
            read[x.size(1)] += x.numel()
            yield *self.to_device(x, y, lengths), share
        self.tokens += tokens
        self.read.update(read)

    def to_device(self, *tensors):
        return [t if t is None else t.to(self.device, non_blocking=True) for t in tensors]

    def check_finite(self, step, loss, grad_norm):
        """Raise UserError if the loss or the norm of the gradient is not finite: before the weights are changed on a
        CPU, at the steps of the log elsewhere, where reading them waits for the device."""
        self.last_loss = loss
        if step % self.given.log_interval == 0 or self.device == "cpu":
            self.raise_if_not_finite(float(loss), "the training loss")
            self.raise_if_not_finite(float(grad_norm), "the norm of the gradient")

    def raise_if_not_finite(self, value, name):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {self.state['step']}: stopped; what is saved in {self.folder} "
                            "is from before; try a lower learning_rate, a smaller grad_clip or dtype=float32")

    def log_step(self, step, loss, **numbers):
        """Log a training step. loss and numbers: floats or scalar tensors."""
        seconds = self.watch.lap(step + 1 - self.logged[0])
        self.tally()
        speed = dist.sum_over_ranks(self.tokens) / seconds
        share = (self.state["work"] - self.logged[1]) / seconds / self.peak
        self.tokens, self.logged, self.state["seconds"] = 0, (step + 1, self.state["work"]), self.watch.seconds()
        max_iters, interval = self.given.max_iters, self.given.eval_interval
        evaluations = (max_iters - 1) // interval - step // interval + 1
        left = self.watch.left(max_iters - step - 1, evaluations * self.per_evaluation + self.at_the_end)
        record = {"step": step, "split": "train", "loss": float(loss), **{key: float(x) for key, x in numbers.items()},
                  "tokens_per_second": speed, "matmul_share": share, "seconds": self.state["seconds"]}
        text = f"step {step}/{max_iters}: loss {record['loss']:.4f}, {speed:,.0f} tokens/s, {share:.0%} of the matmul "
        text += "rate" if left is None else f"rate, {clock(left)} left"
        self.try_save(dist.on_rank0, self.log, record, text)

    def tally(self):
        """Add the work done since the last call to state["work"], in FLOP."""
        work = sum(n * self.model.estimate_flops(T) for T, n in self.read.items())
        self.read.clear()
        self.state["work"] += dist.sum_over_ranks(work)

    # ---- evaluations and checkpoints -------------------------------------------------------

    def should_evaluate(self, step):
        """Whether an evaluation is due; not if the run was resumed right after it."""
        is_due = step % self.given.eval_interval == 0 or step >= self.given.max_iters
        return is_due and self.state["evaluated"] != step

    @contextlib.contextmanager
    def evaluating(self):
        """Around an evaluation: its time is no training time, and random numbers drawn in it change no later step."""
        with self.watch.evaluating(self.per_evaluation):
            yield
        hardware.set_random_state(self.device, self.random)

    def record_evaluation(self, scores):
        """Log the scores of the validation split, and save ckpt.pt, and best.pt if they are the best so far."""
        self.raise_if_not_finite(scores["loss"], "the validation loss")
        self.tally()
        state, score = self.state, -scores["accuracy"] if self.data.kind == "classify" else scores["loss"]
        better, before = score < state["best"], {key: state[key] for key in ("best", "best_step")}
        best = {"best": score, "best_step": state["step"], "worse": 0}
        state.update(best if better else {"worse": state["worse"] + 1})
        state["evaluated"] = state["step"]
        record = {"step": state["step"], "split": "val", **scores, **health(self.model), "work": state["work"]}
        text = f"step {state['step']}: val {format_scores(scores)}{format_stats(record['stats'])}"
        self.try_save(dist.on_rank0, self.log, record, text + " *" * better, True)
        if better and not self.try_save(save_all, self.folder / "best.pt", self.checkpoint_meta(), self.model):
            state.update(before)  # best.pt holds the former best
        self.try_save(self.save_last)

    def checkpoint_meta(self, **more):
        """What a checkpoint holds besides tensors."""
        return {"model_config": asdict(self.model.config), "settings": self.settings, "meta": self.data.meta,
                "source": self.data.meta["source"], "state": self.state, "device": self.device.split(":")[0],
                "dtype": self.dtype, **self.origin, **more}

    def save_last(self):
        self.tally()
        dist.on_rank0(self.log.flush, True)  # before the checkpoint: the log must hold every step that it counts
        self.state["seconds"] = self.watch.seconds()
        meta = self.checkpoint_meta(random=dist.all_gather(self.random))
        save_all(self.folder / "ckpt.pt", meta, self.model, self.optimizer, PREVIOUS)

    def try_save(self, write, *arguments):
        """Call a function that writes, on all ranks; returns whether it could. If not, on_save_error says whether the
        run stops; it always stops at the last step."""
        try:
            write(*arguments)
            return True
        except SaveError as error:
            if self.given.on_save_error == "stop" or self.state["step"] >= self.given.max_iters:
                raise
            self.log.print(f"step {self.state['step']}: {error}; training goes on, the next evaluation tries again")
            return False

    def out_of_patience(self):
        """Whether `patience` evaluations in a row were not better than the best."""
        patience = self.given.patience
        if ended := bool(patience) and self.state["worse"] >= patience:
            print(f"\nno better validation in {patience} evaluations: stopped")
        return ended

    def finish(self):
        """Evaluate the best weights on whole splits; the test split only if eval_test is set."""
        self.state["seconds"] = self.watch.seconds()
        best = self.place(self.load(self.folder / "best.pt", "cpu" if self.given.shard else self.device)[0])
        for split in ["val"] + ["test"] * self.given.eval_test:
            scores, p = evaluate(best, self.data, split, self.given.batch_size, self.device, self.dtype)
            if p is not None:
                _, offsets, label = self.data.texts(split)
                path = self.folder / f"predictions-{split}.npz"
                dist.on_rank0(write_whole, path, lambda file: np.savez(file, p=p, label=label, length=np.diff(offsets)))
            record = {"step": self.state["best_step"], "split": split, "whole": True, **scores, **health(best),
                      "seconds": self.state["seconds"], "work": self.state["work"]}
            text = f"best weights (step {self.state['best_step']}), whole {split} split: {format_scores(scores)}"
            dist.on_rank0(self.log, record, text + format_lengths(scores), True)
        took = clock(time.perf_counter() - self.began)
        print(f"{took} in all; sample with: python sample.py --out_dir={self.folder}")
