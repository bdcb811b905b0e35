"""One run in many processes, as torchrun starts them: torchrun --standalone --nproc_per_node=2 train.py config/x.py

Each process is a rank, which computes one part of every step and of every evaluation. A single process is rank 0 of 1.
Every function here is collective unless it says otherwise: all ranks call it, in the same order.

With DDP (Li et al. 2020) each rank holds the whole model; with FSDP2 (Zhao et al. 2023; `shard`) each holds a part.
"""

import contextlib
import json
import math
import os
import sys
import time
import uuid

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn as nn

from core import hardware
from core.config import UserError
from core.runs import Stop, asked

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# this machine
local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
groups = []  # keeps the process group until the process ends: if DDP holds the last reference, its destructor deadlocks
RANK_LOST = "onnection closed", "onnection reset", "Broken pipe", "gloo", "NCCL", "timed out"  # in torch's errors


@contextlib.contextmanager
def setup(device):
    """Initialise the process group; silence stdout except on rank 0. Yields this rank's device: for `cuda` one GPU.

    Raises UserError for a device that ranks cannot share, and if another rank ends before the run does.
    """
    if world == 1:
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise UserError(f"several ranks need device=cpu, or device=cuda with one GPU each; got {device}")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {rank} needs a GPU of its own; this machine has {torch.cuda.device_count()}: "
                            f"torchrun --nproc_per_node={torch.cuda.device_count()}")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun sets it unless the user has
        torch.set_num_threads(max(1, os.cpu_count() // local_world))
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        store = fresh_store(next(torch_dist.rendezvous("env://"))[0])
        torch_dist.init_process_group(store=store, rank=rank, world_size=world)
        groups.append(torch_dist.group.WORLD)
        yield device
    except RuntimeError as error:
        if not any(words in str(error) for words in RANK_LOST):
            raise
        raise UserError("another rank has ended, and with it the run; its checkpoint is whole: continue with "
                        "--init_from=resume")
    torch_dist.destroy_process_group()


def fresh_store(store):
    """A prefix of torchrun's store that only the processes of this start use.

    torchrun keeps its store when it restarts ranks, and PyTorch 2.13 then reads the entries of the ended processes
    (pytorch#135712 has the history). Here each rank asks under a new name, and rank 0 answers until all have arrived.
    """
    me, asks = uuid.uuid4().hex, [f"ask {n}" for n in range(world)]
    store.set(asks[rank], me)
    if rank:
        place = store.get(f"answer to {me}").decode()
        store.set(f"{me} is in {place}", "yes")
        return torch_dist.PrefixStore(place, store)
    heard, place = {}, f"rendezvous {me}"
    while len(heard) < world - 1 or not all(store.check([f"{who} is in {place}"]) for who in heard.values()):
        for n in range(1, world):
            if store.check([asks[n]]) and (who := store.get(asks[n]).decode()) != heard.get(n):
                heard[n] = who
                store.set(f"answer to {who}", place)
        time.sleep(0.01)
    return torch_dist.PrefixStore(place, store)


def all_gather(value):
    """[value of each rank], for any value that can be pickled."""
    values = [value] * world
    if world > 1:
        torch_dist.all_gather_object(values, value)
    return values


def sum_over_ranks(number):
    """The sum over ranks of a Python number: the same float on each."""
    return sum(all_gather(number))


def any_rank(flag):
    """Whether `flag` is true on any rank: one small message."""
    if world == 1:
        return flag
    flags = torch.tensor(int(flag))  # on the CPU, so that no GPU is synchronised
    torch_dist.all_reduce(flags, torch_dist.ReduceOp.MAX)
    return bool(flags)


def all_reduce(tensor):
    """The sum over ranks of a tensor on their devices, in place."""
    if world > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def leave_if_asked():
    """Raise Stop on every rank if one of them received a signal to stop."""
    if any_rank(bool(asked)):
        raise Stop


def on_all_ranks(function, *arguments):
    """Call a function on each rank; returns its result. A UserError raised on one rank is raised on all; Stop is raised
    on all if one of them received a signal to stop."""
    stop, result, error = bool(asked), None, None
    if not stop:
        try:
            result = function(*arguments)
        except UserError as raised:
            error = raised
    if any_rank(stop or error is not None):
        raise next((each for each in all_gather(error) if each), Stop())
    return result


def on_rank0(function, *arguments):
    """Call a function on rank 0 alone. A UserError that it raises is raised on every rank."""
    error = None
    if rank == 0:
        try:
            function(*arguments)
        except UserError as raised:
            error = raised
    if error := all_gather(error)[0]:
        raise error


def rank_indices(count):
    """The indices below `count` that this rank works on: every `world`-th. All ranks get equally many: the last index
    is repeated if `count` is no multiple of `world`. Not collective."""
    return [min(n, count - 1) for n in range(rank, -(-count // world) * world, world)]


def split_micro_batches(count):
    """(parts, indices) of a step of `count` micro-batches: each is cut by rows into `parts`, as few as give all ranks
    equally many; indices: this rank's (micro-batch, part). Not collective."""
    parts = next(n for n in range(1, world + 1) if n * count % world == 0)
    return parts, [divmod(n, parts) for n in range(rank, count * parts, world)]


def seed(number, step=0):
    """Seed this rank's random stream: a different one for every seed, step and rank. Not collective."""
    words = np.random.SeedSequence([number, step, rank]).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def restarted(folder):
    """Whether torchrun has restarted this run after one of its ranks had ended."""
    try:
        launch = json.loads((folder / "config.json").read_text("utf-8"))["launch"]
    except (OSError, ValueError, KeyError, TypeError):
        launch = None
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and launch == launch_name() is not None
    return any_rank(again)


def launch_name():
    """torchrun's name of this start of a run; None without torchrun. Not collective."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


# ---- the model on several ranks ----------------------------------------------------------------


def shard(model, device):
    """Shard a model's weights over all ranks (FSDP2), one unit a layer, in place; returns it.

    The few parameters that masks depend on stay whole on each rank: mechanisms read them outside of `forward`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, masks = init_device_mesh(device.split(":")[0], (world,)), set(unsharded_parameters(model))
    for p in masks:
        p.data = p.data.to(device)
    for layer in model.layers:
        if hasattr(layer, "forward"):
            fully_shard(layer, mesh=mesh, ignored_params=masks)
    return fully_shard(model, mesh=mesh, ignored_params=masks)


def unsharded_parameters(model):
    """The parameters that `shard` leaves whole, in the same order on each rank: the masks', and scalars, which FSDP
    refuses. Not collective."""
    masks = set(model.mask_parameters())
    return [p for p in model.parameters() if p in masks or p.dim() == 0]


def is_sharded(x):
    """Whether a tensor, or the first weight of a model, is sharded. Not collective."""
    if world == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x if hasattr(x, "shape") else next(x.parameters()), DTensor)


def wrap(model, compile=False):
    """The module to call in training in place of `model`: compiled by torch.compile if `compile` is true, and in DDP if
    there are several ranks and the model is not sharded."""
    net = hardware.compiled(model) if compile else model
    if world == 1 or is_sharded(model):
        return net
    return nn.parallel.DistributedDataParallel(net, forward_sync_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(net, enabled):
    """Within it, the backward pass of `net` (from `wrap`) averages gradients over ranks, or only accumulates them."""
    with contextlib.nullcontext() if enabled or not hasattr(net, "no_sync") else net.no_sync():
        if is_sharded(net):
            net.set_requires_gradient_sync(enabled)
        yield


def micro_batches(net, source, step, count):
    """Yield (x, y, lengths, share) of this rank's part of a step of `count` micro-batches, read from `source`.

    share: of the step's targets; the shares of all ranks add up to 1. `net` (from `wrap`) averages gradients over ranks
    in the backward pass of the last part only. Raises Stop or a UserError of any rank on all ranks.
    """
    parts, mine = split_micro_batches(count)
    for micro, part in mine:
        index = step * count + micro, part, parts
        with gradient_sync(net, enabled=(micro, part) == mine[-1]):
            yield *on_all_ranks(source.batch, *index), source.share(*index) / count


def backward(loss):
    """Accumulate the gradients of this rank's share of the loss, so that their mean over ranks is that of the sum."""
    (world * loss if world > 1 else loss).backward()


def clip_grad_norm(model, max_norm):
    """After the last backward pass of a step: scale the gradients so that their norm over all ranks is at most max_norm
    (0: no limit). Returns the norm before that, a tensor."""
    if is_sharded(model):
        for p in unsharded_parameters(model):  # FSDP does not average these
            torch_dist.all_reduce(p.grad)
            p.grad /= world
    kinds = {}  # sharded and whole tensors cannot be in one call
    for p in model.parameters():
        if p.grad is not None:
            kinds.setdefault((is_sharded(p), p.grad.is_sparse), []).append(p)
    for p in kinds.get((False, True), []):
        p.grad = p.grad.coalesce()  # each row once
    norms = [nn.utils.get_total_norm([p.grad.values() if sparse else p.grad for p in kind])
             for (_, sparse), kind in kinds.items()]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for (_, sparse), kind in kinds.items():
        nn.utils.clip_grads_with_norm_(kind, max_norm or math.inf, norm, foreach=False if sparse else None)
    return norm


def distribute_like(tensor, like):
    """A whole tensor, sharded as `like`, which has its shape."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)
