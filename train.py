"""Train a language model or a classifier: python train.py [config/x.py] [--key=value ...]

On several GPUs or machines: torchrun --standalone --nproc_per_node=8 train.py [config/x.py] [--key=value ...]

A run is a folder: config.json, log.jsonl (one object a line), ckpt.pt (the last state, from which --init_from=resume
continues), ckpt-previous.pt (the one before), best.pt (the weights with the best validation score).

The loop is `main`, at the end of this file. Change it as you like: `run` (core/run.py) saves, resumes and stops it, and
`dist` (core/dist.py) makes it one of several ranks.
"""

from core import startup  # first: torch reads its settings when it is loaded

import math
import time
from dataclasses import fields
from types import SimpleNamespace

STARTED = time.perf_counter()  # before torch is loaded, which takes seconds

import torch

from core import dist, hardware
from core.config import UserError, check_choice, configure, run_main
from core.dataset import batches
from core.evaluation import evaluate
from core.launch import check_size
from core.optimizers import Optimizers, adamw  # Optimizers: for configure_optimizer, when you edit it
from core.run import Run
from core.warm_start import WarmStart, check_init_from
from model import GPTConfig, load, new_model, options_of

# ---- settings: every name here is a key of the command line and of config files ---------------

# the run
out_dir = "out"
# or 'resume': continue from out_dir/ckpt.pt; or 'auto': resume if that exists; or a run's folder, or a checkpoint file:
# begin with its weights and the model settings that are not given (core/warm_start.py)
init_from = "scratch"
seed = 1337  # of weights, dropout and the order of the data
on_save_error = "stop"  # for example if the disk is full; or 'warn': train on and try again at the next evaluation
eval_only = False  # evaluate out_dir's best.pt and exit
eval_test = False  # after training, evaluate the best weights on the test split as well
eval_interval = 175  # steps between evaluations, each with a checkpoint
eval_iters = 20  # batches of an evaluation while training, spread over the split; 0: the whole split
eval_train = False  # evaluate the training split as well, to see overfitting
patience = 0  # stop after so many evaluations without a better one; 0: never
log_interval = 10
wandb_log = False
wandb_project = "attention"
wandb_run_name = ""  # default: out_dir

# the data
dataset = "stdlib"  # a folder, or NAME for data/NAME
task = ""  # 'lm': read a set of reviews as running text
align_documents = False  # training windows of running text start where documents do; False: anywhere
batch_size = 8  # texts of one forward pass
gradient_accumulation_steps = 1  # forward passes of one step, shared among ranks

# the model: see GPTConfig in model.py
model = "gpt"
block_size = 256
n_layer = 4
n_head = 4
n_kv_head = 0
n_embd = 256
dropout = 0.0
bias = False
pos = "rope"
norm = "rmsnorm"
activation = "gelu"
zero_init = False
ngram = 0
ngram_rows = 65536
ngram_dim = 32
ngram_dropout = 0.0
ngram_sparse = False  # a step then costs the rows of the tables that it reads: SparseAdam instead of AdamW for them
tie = True
pool = "mean"
document_mask = False  # a token sees its own document only
attention = "dense"
qk_norm = False
attention_sink = False
kernel = "auto"

# the optimiser: AdamW
mask_lr = 1.0  # the rate of spans, periods and other parameters of the mask, as a multiple of learning_rate
ngram_lr = 1.0  # the rate of the tables of n-grams, likewise
learning_rate = 2e-3  # small models allow more than nanoGPT's 6e-4
min_lr = 2e-4
max_iters = 350
warmup_iters = 35
decay_lr = True
lr_schedule = "cosine"  # or 'linear'
lr_decay_iters = 0  # steps until min_lr; 0: max_iters
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99  # small batches need a longer average of the second moment
grad_clip = 1.0  # maximum norm of the gradient; 0: no limit

# the machine
device = "auto"
dtype = "auto"  # of products: 'float32' or 'bfloat16'
shard = False  # FSDP: shard the model over the ranks of torchrun, if it does not fit one
compile = False  # torch.compile: needs a C++ compiler on a CPU, and takes a while to start


def get_lr(step):
    """The learning rate of a step: linear warm-up, then cosine or linear decay to min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    progress = min(1.0, (step - warmup_iters) / max(1, (lr_decay_iters or max_iters) - warmup_iters))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if lr_schedule == "cosine" else 1 - progress
    return min_lr + decay * (learning_rate - min_lr)


def configure_optimizer(model):
    """The optimiser: edit me, for example torch.optim.SGD(groups, lr=learning_rate, momentum=0.9). Any optimiser whose
    state is tensors and numbers is saved and resumed.

    For two, each with weights of its own, return Optimizers(torch.optim.Muon(matrices), torch.optim.AdamW(others)).
    """
    groups = model.parameter_groups(weight_decay, mask_lr, ngram_lr)
    return adamw(groups, learning_rate, (beta1, beta2))


def check(settings):
    """Raise UserError for a value that no run can have."""
    given = SimpleNamespace(**settings)
    if not given.out_dir:
        raise UserError("out_dir expects the path of a folder, got nothing")
    check_init_from(given.init_from)
    check_choice("on_save_error", given.on_save_error, ("stop", "warn"))
    check_choice("lr_schedule", given.lr_schedule, ("cosine", "linear"))
    if given.dtype == "float16" and not given.eval_only:
        raise UserError("training expects dtype 'auto', 'float32' or 'bfloat16', got 'float16', which needs a gradient "
                        "scaler; use bfloat16 or float32")
    at_least = dict.fromkeys(("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"), 1)
    at_least |= dict.fromkeys(("seed", "max_iters", "warmup_iters", "lr_decay_iters", "eval_iters", "patience",
                               "learning_rate", "mask_lr", "ngram_lr", "min_lr", "weight_decay", "grad_clip", "beta1",
                               "beta2"), 0)
    for key, least in at_least.items():
        if not settings[key] >= least:
            raise UserError(f"{key} must be at least {least}, got {settings[key]}")
    several_gpus = dist.world > 1 and torch.device(hardware.pick_device(given.device)).type == "cuda"
    if given.ngram_sparse and (given.shard or several_gpus):
        raise UserError("ngram_sparse=True is for one device or several ranks on CPUs: it cannot be sharded, and NCCL "
                        "adds no sparse gradients of several GPUs (pytorch#22400); set it to False")
    if given.seed >= 2**63:
        raise UserError(f"seed must be below 2**63, got {given.seed}")
    for key in ("beta1", "beta2"):
        if settings[key] >= 1:
            raise UserError(f"{key} must be below 1, got {settings[key]}")
    if not 0 <= given.dropout <= 1 - 2**-16:  # the engine draws 16 random bits
        raise UserError(f"dropout must be at least 0 and below 1 by 2**-16 or more, got {given.dropout}")
    count = given.gradient_accumulation_steps
    if count > 10**6:
        raise UserError(f"gradient_accumulation_steps must be at most {10**6} forward passes, got {count}")
    if dist.split_micro_batches(count)[0] > given.batch_size:
        raise UserError(f"{dist.world} ranks cannot share gradient_accumulation_steps={count} batches of "
                        f"batch_size={given.batch_size}: increase one of the two, or use fewer ranks")


def mechanism_options(settings):
    """The options of the chosen model and mechanism with their defaults."""
    return options_of(settings["model"], settings["attention"])


def model_config(settings, options, data):
    """The GPTConfig of these settings, for the vocabulary and the classes of a Dataset."""
    shape = {field.name: settings[field.name] for field in fields(GPTConfig) if field.name in settings}
    return GPTConfig(**shape, vocab_size=data.vocab_size, n_class=len(data.classes), document_mark=data.tokenizer.mark,
                     options=options)


def build_model(run, settings, options):
    """A new model with weights from the seed or from init_from, or the one in out_dir, whose shape then replaces that
    of the settings."""
    if not run.is_new:
        return run.load_model(mechanism_options(settings))
    check_size(settings, run.data, run.device)
    torch.manual_seed(seed)
    model = new_model(model_config(settings, options, run.data))
    if run.warm.path:
        run.warm.copy_into(model, run.data.meta)
    return run.place(model)


def main(arguments=None):
    """Train with `arguments` (default: the command line). Returns the exit code of a run that was stopped, else
    None."""
    began = STARTED if __name__ == "__main__" else time.perf_counter()
    warm = WarmStart(GPTConfig)
    settings, options = configure(globals(), arguments, mechanism_options, warm.inherit)
    check(settings)
    with dist.setup(hardware.pick_device(device)) as dev, Run(settings, options, dev, load, began, warm) as run:
        model = build_model(run, settings, options)
        autocast = run.choose_precision(model)
        if eval_only:
            return run.print_scores(model)
        optimizer = configure_optimizer(model)
        source = batches(run.data, "train", batch_size, model.config.block_size, seed, align_documents)
        run.restore(model, optimizer, source)
        net = dist.wrap(model, compile)
        for step in run.steps():  # from the restored step; left in order after a signal
            if run.should_evaluate(step):
                with run.evaluating():
                    scores, _ = evaluate(model, run.data, "val", batch_size, dev, run.dtype, eval_iters)
                    if eval_train:
                        others, _ = evaluate(model, run.data, "train", batch_size, dev, run.dtype, eval_iters)
                        scores |= {f"train_{name}": score for name, score in others.items()}
                    run.record_evaluation(scores)  # log, ckpt.pt, best.pt
            if run.out_of_patience() or step >= max_iters:
                break
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step) * group.get("lr_scale", 1.0)
            loss_sum = torch.zeros((), device=dev)
            for x, y, lengths, share in run.micro_batches(net, source, step):
                with autocast:
                    logits, loss = net(x, y, lengths)
                dist.backward((loss + model.penalty()) * share)
                loss_sum += loss.detach() * share
            loss_sum, grad_norm = dist.all_reduce(loss_sum), dist.clip_grad_norm(model, grad_clip)
            run.check_finite(step, loss_sum, grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % log_interval == 0:
                run.log_step(step, loss_sum, lr=get_lr(step), grad_norm=grad_norm)
        run.finish()
    return run.exit_code


if __name__ == "__main__":
    run_main(main)
