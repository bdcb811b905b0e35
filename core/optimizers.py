"""The state of any optimiser: what checkpoints save of it, and how it is restored.

A checkpoint holds {name of the weight: {key: tensor or number}}, so it does not depend on the order of the weights or
on the number of ranks. Hyperparameters of the groups are not saved: they follow the settings.
"""

import torch

from core import dist
from core.config import UserError
from core.readers import expect, record
from core.shards import read_shards, shard_entries

NOT_NEGATIVE = ("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # entries of torch.optim's optimisers


class Optimizers:
    """Several optimisers, each of its own weights, in place of one: `Optimizers(Muon(matrices), AdamW(others))`."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


def adamw(groups, lr=1e-3, betas=(0.9, 0.99)):
    """AdamW of `Model.parameter_groups`; for groups of sparse gradients SparseAdam, which changes only the rows that a
    step read, without weight decay. It has no average of gradients (beta1 = 0): a rare row's would be of long ago."""
    sparse = [group | {"lr": lr} for group in groups if group["sparse"]]  # SparseAdam's own argument may not be 0
    dense = torch.optim.AdamW([group for group in groups if not group["sparse"]], lr=lr, betas=betas, fused=True)
    return Optimizers(dense, torch.optim.SparseAdam(sparse, betas=(0.0, betas[1]))) if sparse else dense


def each_of(optimizer):
    """The optimisers of an `Optimizers`, or the one itself."""
    return getattr(optimizer, "optimizers", (optimizer,))


def state_of(optimizer):
    """{weight: the dict of its state}, of each weight that the optimiser updates; these are the optimiser's own
    dicts."""
    return {p: one.state[p] for one in each_of(optimizer) for group in one.param_groups for p in group["params"]}


def optimizer_state(model, optimizer):
    """{name of the weight: {key: tensor or number}}; {} for a weight without state. Raises UserError for others."""
    state = state_of(optimizer)
    named = {name: dict(state[p]) for name, p in model.named_parameters() if p in state}
    for name, values in named.items():
        for key, value in values.items():
            if not isinstance(value, (torch.Tensor, bool, int, float)):
                raise UserError(f"the optimiser's state of {name} has {key} of type {type(value).__name__}; a "
                                "checkpoint holds tensors and numbers")
    return named


def as_tensors(named):
    """The same with float64 tensors in place of numbers, which shards cannot hold."""
    return {name: {key: x if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64) for key, x in values.items()}
            for name, values in named.items()}


def initialize_state(optimizer):
    """Let an optimiser create its state: a step with zero gradients and a learning rate of 0. Weights stay as they
    are."""
    rates = [group["lr"] for group in optimizer.param_groups]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    for one in each_of(optimizer):
        layout = torch.sparse_coo if isinstance(one, torch.optim.SparseAdam) else torch.strided
        for p in (p for group in one.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p, layout=layout)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for p, value in zip(weights, before):
            p.copy_(value)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def check_tensor(name, tensor, shape, dtype=None):
    """Raise ValueError unless a value of a checkpoint is a complete floating-point tensor of this shape (None: any), or
    of this dtype."""
    expect(torch.is_tensor(tensor) and tensor.layout == torch.strided, "a tensor", tensor, name)
    expect(tensor.dtype == dtype if dtype else tensor.is_floating_point(), dtype or "floating point", tensor.dtype,
           name)
    expect(shape is None or tensor.shape == shape, f"the shape {shape and tuple(shape)}", tuple(tensor.shape), name)
    size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    expect(size <= stored, f"{size:,} bytes", stored, name)


def checked_value(name, key, value, like):
    """`value` of a checkpoint on the device, or the ranks, of `like`, which the optimiser created. Raises
    ValueError."""
    place = f"{key} of {name}"
    if torch.is_tensor(like):
        check_tensor(place, value, like.shape, like.dtype)
    else:
        expect(type(value) is type(like), type(like).__name__, value, place)
    numbers = torch.as_tensor(value)
    if not numbers.isfinite().all() or key in NOT_NEGATIVE and (numbers < 0).any():
        raise ValueError(f"{place} holds numbers that are negative or not finite")
    return dist.distribute_like(value.to(like.device), like) if torch.is_tensor(like) else value


def restore_optimizer(path, checkpoint, model, optimizer):
    """Give an optimiser the state that the checkpoint at `path`, already read, holds.

    Raises KeyError, ValueError or RuntimeError if it is the state of another model or another optimiser.
    """
    initialize_state(optimizer)
    state = state_of(optimizer)
    named = {name: state[p] for name, p in model.named_parameters() if p in state}
    has_state = any(named.values())
    if "shards" in checkpoint:
        restore_shards(path, checkpoint["shards"], named)
    else:
        saved = checkpoint["optimizer"]
        # of earlier versions, which saved nothing before the first step
        if not saved and not checkpoint["state"]["step"]:
            saved = dict.fromkeys(named, {})
        restore_values(saved, named)
    if has_state and checkpoint["state"]["step"] and not any(named.values()):
        raise ValueError("it is empty, which is not the state of what configure_optimizer returns")


def check_keys(name, saved, expected):
    """Raise ValueError unless a weight's saved state has the expected keys or is empty, as that of an unused weight
    is."""
    if saved and saved != expected:
        raise ValueError(f"{name} has {', '.join(sorted(saved))}; what configure_optimizer returns expects "
                         f"{', '.join(sorted(expected)) or 'nothing'}")


def restore_values(saved, named):
    """Fill {name of the weight: the optimiser's dict} in place from the same of a checkpoint, all of it or nothing."""
    if unlike := saved.keys() ^ named.keys():
        raise ValueError(f"it differs in {sorted(unlike)[0]}")
    values = {}
    for name, of_weight in saved.items():
        record({})(of_weight, name)
        check_keys(name, of_weight.keys(), named[name].keys())
        values[name] = {key: checked_value(name, key, value, named[name][key]) for key, value in of_weight.items()}
    for name, of_weight in values.items():
        named[name].clear()
        named[name].update(of_weight)


def restore_shards(path, shards, named):
    """Fill {name of the weight: the optimiser's dict} in place from the shards beside `path`."""
    entries = shard_entries(path, shards)
    for name, values in named.items():
        prefix = f"optimizer.{name}."
        saved = {key.removeprefix(prefix) for key in entries if key.startswith(prefix)}
        check_keys(name, saved, values.keys())
        if not saved:
            values.clear()
    tensors = as_tensors(named)
    if any(tensors.values()):
        read_shards(path, shards, {"optimizer": tensors})
    for name, values in named.items():
        for key, value in values.items():
            if not torch.is_tensor(value):
                values[key] = type(value)(tensors[name][key].item())
