"""One run in many processes, as torchrun starts them: torchrun --standalone --nproc_per_node=2 train.py config/x.py

Each process is a rank, which computes its own part of every step and of every evaluation; a process alone is rank 0
of 1. Whatever stands here is called by all ranks alike and in the same order, since each waits for the others.

DDP (Li et al. 2020) holds the model on every rank; FSDP2 (Zhao et al. 2023; `shard`) a part of it on each.
"""

import contextlib
import json
import os
import sys
import time
import uuid

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn as nn

from core.config import UserError
from core.runs import Stop, asked

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
local, neighbours = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
GONE = "onnection closed", "onnection reset", "Broken pipe", "gloo", "NCCL", "timed out"  # how torch says that a rank is no more


@contextlib.contextmanager
def joined(device):
    """Meet the other ranks, which are mute from here on but for rank 0. Yields the device of this one, of `cuda` its own GPU.

    Raises UserError for a device that cannot be many ranks', and where another rank ends before the run does.
    """
    if world == 1:
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise UserError(f"many ranks train on device=cpu, or on device=cuda where each has its own GPU; got {device}")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"rank {rank} needs a GPU of its own; this machine has {torch.cuda.device_count()}: "
                            f"torchrun --nproc_per_node={torch.cuda.device_count()}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's word, where nobody said one
        torch.set_num_threads(max(1, os.cpu_count() // neighbours))
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        torch_dist.init_process_group(store=meeting(next(torch_dist.rendezvous("env://"))[0]), rank=rank, world_size=world)
        yield device
    except RuntimeError as error:
        if not any(words in str(error) for words in GONE):
            raise
        raise UserError("another rank has ended, and with it the run; what is saved is whole: go on with --init_from=resume")
    torch_dist.destroy_process_group()


def meeting(store):
    """A part of torchrun's store for the processes that are alive now.

    torchrun keeps its store when it starts ranks again, and PyTorch 2.13 then takes what the dead ones left there for the
    living (pytorch#135712 has the history). Here each rank asks under a new name, and rank 0 answers until all have come.
    """
    me, asks = uuid.uuid4().hex, [f"ask {n}" for n in range(world)]
    store.set(asks[rank], me)
    if rank:
        place = store.get(f"answer to {me}").decode()
        store.set(f"{me} is in {place}", "yes")
        return torch_dist.PrefixStore(place, store)
    heard, place = {}, f"meeting {me}"
    while len(heard) < world - 1 or not all(store.check([f"{who} is in {place}"]) for who in heard.values()):
        for n in range(1, world):
            if store.check([asks[n]]) and (who := store.get(asks[n]).decode()) != heard.get(n):
                heard[n] = who
                store.set(f"answer to {who}", place)
        time.sleep(0.01)
    return torch_dist.PrefixStore(place, store)


def gather(value):
    """[value of each rank], of anything that can be pickled."""
    found = [value] * world
    if world > 1:
        torch_dist.all_gather_object(found, value)
    return found


def total(value):
    """The sum over ranks of a number: the same float on each."""
    return sum(gather(value))


def any_rank(flag):
    """Whether `flag` is true on any rank: one small message, however many there are."""
    if world == 1:
        return flag
    found = torch.tensor(int(flag))  # on the CPU: no GPU is waited for
    torch_dist.all_reduce(found, torch_dist.ReduceOp.MAX)
    return bool(found)


def all_reduce(tensor):
    """The sum over ranks of a tensor on their devices, in place."""
    if world > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def leave_if_asked():
    """Raise Stop, on every rank, where a signal asked one of them to stop."""
    if any_rank(bool(asked)):
        raise Stop


def together(function, *arguments):
    """What a function returns on each rank. Where it raises a UserError on one, all raise it; or Stop, where a signal
    asked one of them to stop."""
    stop, result, error = bool(asked), None, None
    if not stop:
        try:
            result = function(*arguments)
        except UserError as raised:
            error = raised
    if any_rank(stop or error is not None):
        raise next((each for each in gather(error) if each), Stop())
    return result


def on_rank0(function, *arguments):
    """Call a function on rank 0 alone. A UserError that it raises is raised on every rank."""
    error = None
    if rank == 0:
        try:
            function(*arguments)
        except UserError as raised:
            error = raised
    if error := gather(error)[0]:
        raise error


def own(count):
    """The numbers below `count` that are this rank's: every `world`-th. All ranks get equally many, since they compute
    together; where that does not come out even the last number stands for what is missing."""
    return [min(n, count - 1) for n in range(rank, -(-count // world) * world, world)]


def pieces(micro_batches):
    """How a step is dealt: (parts, own), `parts` of each of the micro-batches by rows, as few as give every rank equally
    many pieces, and the (micro-batch, part) of this rank's."""
    parts = next(n for n in range(1, world + 1) if n * micro_batches % world == 0)
    return parts, [divmod(n, parts) for n in range(rank, micro_batches * parts, world)]


def seed(number, step=0):
    """Begin this rank's random stream: another one for every seed, step and rank."""
    words = np.random.SeedSequence([number, step, rank]).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def restarted(folder):
    """Whether torchrun has started this run before, with these same words, after a rank of it had ended."""
    try:
        launch = json.loads((folder / "config.json").read_text("utf-8"))["launch"]
    except (OSError, ValueError, KeyError, TypeError):
        launch = None
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and launch == launch_name() is not None
    return any_rank(again)


def launch_name():
    """What torchrun calls this start of a run; None without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


# ---- the model on many ranks -------------------------------------------------------------------


def shard(model, device):
    """Split a model's weights over all ranks, each layer's on its own, in place; returns it.

    What the mechanisms' masks depend on (a few numbers) stays whole on each: their plans read it outside of `forward`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, masks = init_device_mesh(device.split(":")[0], (world,)), set(whole_parameters(model))
    for p in masks:
        p.data = p.data.to(device)
    for layer in model.layers:
        if hasattr(layer, "forward"):
            fully_shard(layer, mesh=mesh, ignored_params=masks)
    return fully_shard(model, mesh=mesh, ignored_params=masks)


def whole_parameters(model):
    """The parameters that `shard` leaves whole, in the same order on each rank: the masks', and scalars (FSDP limit)."""
    masks = {id(p) for attention in model.attentions() for p in attention.mask_parameters()}
    return [p for p in model.parameters() if id(p) in masks or p.dim() == 0]


def is_sharded(x):
    """Whether a tensor, or the first of a model's weights, is split over ranks."""
    if world == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x if hasattr(x, "shape") else next(x.parameters()), DTensor)


def synchronised(model, forward):
    """What to call in training in the place of `forward` (the model, or torch.compile's of it): with DDP around it."""
    if world == 1 or is_sharded(model):
        return forward
    return nn.parallel.DistributedDataParallel(forward, forward_sync_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def piece(model, forward, last):
    """Around the forward and backward pass of a piece of a step: gradients meet after the last one alone."""
    with contextlib.nullcontext() if last or not hasattr(forward, "no_sync") else forward.no_sync():
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
        yield


def mean_of_whole(model):
    """The mean over ranks of the gradients that FSDP leaves alone: after the last piece of a step."""
    if is_sharded(model):
        for p in whole_parameters(model):
            torch_dist.all_reduce(p.grad)
            p.grad /= world


def clip(parameters, most):
    """Scale gradients so that their norm, over all ranks, is at most `most`. Returns the norm before that, a tensor."""
    kinds = {}  # sharded and whole tensors do not mix
    for p in parameters:
        if p.grad is not None:
            kinds.setdefault(is_sharded(p), []).append(p)
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds.values()]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds.values():
        nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm


def split_like(tensor, p):
    """A whole tensor, split over ranks as the weight p of its shape is."""
    if not is_sharded(p):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements)
