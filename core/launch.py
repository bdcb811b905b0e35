"""Before the loop of a run: its data, whether its model can fit into memory, and what is printed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from core import ROOT, dist, hardware
from core.config import UserError
from core.dataset import Dataset, batches

EMBEDDED = ("stdlib", "toy", "sentences", "recall")  # datasets that are prepared without a network


def open_data(settings):
    """The Dataset of the settings; one that needs no network is prepared first. Raises UserError."""
    name = settings.dataset
    missing = name in EMBEDDED and not any((folder / name / "meta.json").exists() for folder in (Path(), ROOT / "data"))
    if any(dist.all_gather(missing)):
        dist.on_all_ranks(prepare_embedded, name)
    data = Dataset(name, settings.task)
    for split in ["val"] + ["test"] * settings.eval_test + ["train"] * (not settings.eval_only):
        # raises what would otherwise be raised after the training
        batches(data, split, 1, settings.block_size, align_documents=settings.align_documents)
    return data


def prepare_embedded(name):
    """Run data/NAME/prepare.py, on the first rank of each machine."""
    script = ROOT / "data" / name / "prepare.py"
    if dist.local_rank == 0:
        print(f"{name} is not prepared: python data/{name}/prepare.py", flush=True)
        done = subprocess.run([sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"data/{name}/prepare.py failed ({done.stderr.strip()[-300:]}); run it yourself")


def print_changes(checkpoint, settings, free):
    """Print which settings differ from those of a checkpoint. free: those of its model that may change."""
    config = checkpoint["model_config"]
    saved = {**checkpoint["settings"], **config, **config["options"]}
    for key, value in settings.items():
        before, fixed = saved.get(key, value), key in config and key not in free
        if before != value and key not in ("init_from", "eval_only", "eval_test", "out_dir", "device", "dtype"):
            was, now = ("stays", "not") if fixed else ("was", "is now")
            print(f"checkpoint: {key} {was} {before!r}, {now} {value!r}")


def check_size(settings, data, device):
    """Raise UserError if the weights, or the tokens of a batch, exceed the memory by far: the system would end the
    process without a message, or swap."""
    given = SimpleNamespace(**settings)
    room, C = hardware.memory_size(device) * (dist.world if given.shard else 1), given.n_embd
    tables = max(0, given.ngram - 1) * given.ngram_rows * given.ngram_dim
    model_bytes = 16 * (10 * C * C * given.n_layer * (given.model == "gpt") + C * data.vocab_size + tables)
    batch_bytes = given.batch_size * given.block_size * (16 + 4 * C) if data.kind == "lm" else 0
    sizes = f"n_layer={given.n_layer}, n_embd={C}" + f", ngram_rows={given.ngram_rows}" * bool(tables)
    for need, what in ((model_bytes, f"weights, gradients and AdamW of {sizes}"),
                       (batch_bytes, f"a batch of batch_size={given.batch_size}, block_size={given.block_size}")):
        if need > room:
            raise UserError(f"{what} need {need / 2**30:,.0f} GiB at least; {device} has {room / 2**30:,.0f}: make "
                            "them smaller")


def print_costs(model, example, settings, device, dtype):
    """Print how attention read its options, and what the model costs.

    example: a batch of one text, whose activations are counted unless it is sharded.
    """
    for line in dict.fromkeys(attn.description for attn in model.attentions() if attn.description):
        print(line)
    N, T, activations = model.parameter_count(), example[0].size(1), ""
    if not dist.is_sharded(model):
        with hardware.autocast(device, dtype):
            size = hardware.activation_bytes(model, *example) * settings.batch_size
        size /= dist.split_micro_batches(settings.gradient_accumulation_steps)[0]
        activations = f", {size / 2**20:,.0f} MiB of activations in a forward pass"
    print(f"{N:,} parameters, {model.estimate_flops(T) / 1e6:,.1f} MFLOP to train on a token of {T}, "
          f"{16 * N / 2**20:,.0f} MiB of weights, gradients and AdamW{activations}")


def print_machine(model, device, dtype, peak):
    """Print what the run computes on, and how. peak: FLOP/s of matrix products."""
    kernels = " and ".join(sorted({layer.choose_kernel(device, getattr(torch, dtype)) for layer in model.attentions()}))
    ranks = f"{dist.world} ranks, " * (dist.world > 1)
    print(f"{device} ({ranks}{torch.get_num_threads()} threads), products in {dtype}: {peak / 1e9:,.0f} GFLOP/s; "
          f"{model.config.attention} attention{kernels and f' by {kernels}'}")


def count_evaluation_batches(data, settings, block_size):
    """(batches of an evaluation while training, batches of the evaluations after it)."""
    during = ["val"] + ["train"] * settings.eval_train
    count = {split: len(batches(data, split, settings.batch_size, block_size).groups())
             for split in during + ["test"] * settings.eval_test}
    batches_during = sum(min(settings.eval_iters or count[split], count[split]) for split in during)
    return batches_during, count["val"] + count.get("test", 0)


def explain_log(settings, data, batches_per_evaluation):
    """Print what the numbers of the following lines are."""
    answers = "distances_sha256" in data.splits["train"]  # the other tokens have no loss
    unit = "text" if data.kind == "classify" else "answer" if answers else "token"
    print(f"A line every {settings.log_interval} steps: the step, of all; the loss of its batch in nats per {unit}; "
          "tokens per second of training since the line before, without evaluations; the operations that they need, as "
          "a share of the rate of matrix products above; the time left, with evaluations")
    print(f"A line every {settings.eval_interval} steps: the scores of {batches_per_evaluation} batches, then the "
          "attention's statistics, means over layers and heads; * marks the best so far, which best.pt holds")
