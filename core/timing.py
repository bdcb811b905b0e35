"""What calls cost, measured in turn, what they send, and the training step that compare.py and bench.py measure."""

import math
import statistics
import time
from typing import NamedTuple

import torch

from core import dist, hardware


class Cost(NamedTuple):
    """What one of the calls of `side_by_side` takes."""

    seconds: float  # the median
    memory: float  # the most bytes beyond what was held before; nan where unknown
    rounds: int  # that the median is of


def side_by_side(calls, device="cpu", times=5, budget=math.inf):
    """The `Cost` of each of `calls`, run in turn so that what else the machine does falls on all of them.

    `times` rounds, or as many as begin within `budget` seconds but at least 3. Two rounds before
    them (one where it takes longer than the budget) are not timed: in the second the memory is
    taken, when what the first had to load and to compile is there. Calls of less than a second run
    once more, untimed, before each time: as in a loop, and not with the caches and the memory as
    calls of many seconds leave them.
    """
    taken = [[] for _ in calls]
    for _ in range(2):
        began = time.perf_counter()
        memory, quick = [], []
        for call in calls:
            before = time.perf_counter()
            memory.append(hardware.memory_of(call, device))
            quick.append(time.perf_counter() - before < 1)
        if time.perf_counter() - began > budget:
            break
    began, rounds = time.perf_counter(), 0
    while rounds < times and (rounds < 3 or time.perf_counter() - began < budget):
        for call, again, seconds in zip(calls, quick, taken):
            if again:
                call()
            hardware.synchronize(device)
            start = time.perf_counter()
            call()
            hardware.synchronize(device)
            seconds.append(time.perf_counter() - start)
        rounds += 1
    return [Cost(statistics.median(seconds), most, rounds) for seconds, most in zip(taken, memory)]


def training_step(model, net, optimizer, batches, device, dtype):
    """One training step, as the loop of train.py does it: gradients of all batches, clipped, and an update.

    net: `model`, or what torch.compile made of it. batches: (x, y, lengths or None, share of the loss) each, on the
    device.
    """
    for x, y, lengths, share in batches:
        with hardware.autocast(device, dtype):
            loss = net(x, y)[1] if lengths is None else net(x, y, lengths)[1]
        ((loss + model.penalty()) * share).backward()
    dist.clip_grad_norm(model, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def traffic(call, device, times):
    """(median seconds, bytes that a rank sends) of a call that all ranks make, of `times` calls after two.

    The bytes are read off this machine's own network, where ranks on a CPU meet.
    """
    for _ in range(2):  # in which DDP finds the order of its messages
        call()
    before, seconds = bytes_so_far(device), []
    for _ in range(times):
        began = time.perf_counter()
        call()
        hardware.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), (bytes_so_far(device) - before) / times / dist.world


def bytes_so_far(device):
    """Bytes sent so far, when every rank has sent what it has to."""
    hardware.synchronize(device)
    dist.any_rank(False)
    time.sleep(0.05)
    sent = hardware.sent_bytes()
    dist.any_rank(False)
    return sent


def growth(rows):
    """Rows of exponents fitted over T on log axes to the rows of `bench.py attention`, where one batch and heads has
    three T or more."""
    lines = {}  # {(batch x heads, label): {T: what grows}}
    for row in rows:
        group, T = row["batch x heads x time"].rsplit("x", 1)
        pairs = [row[f"pairs {how}"] * int(T) ** 2 for how in ("kept", "multiplied")]
        lines.setdefault((group, row["attention"]), {})[int(T)] = row["ms"], *pairs, row["MiB more"]
        lines.setdefault((group, "fused call"), {})[int(T)] = row["fused call, ms"], None, None, row["fused, MiB more"]
    columns = ["time ~ T^", "pairs kept ~ T^", "pairs multiplied ~ T^", "memory ~ T^"]
    return [
        {"growth": label, "batch x heads": group, **{name: slope(line, n) for n, name in enumerate(columns)}}
        for (group, label), line in sorted(lines.items(), key=lambda item: item[0][1] == "fused call") if len(line) >= 3
    ]


def slope(line, n):
    """The exponent with which the n-th number of a line {T: numbers} grows; None where one is missing or 0."""
    if not all(numbers[n] and numbers[n] > 0 for numbers in line.values()):
        return None
    return statistics.linear_regression([math.log(T) for T in line],
                                        [math.log(numbers[n]) for numbers in line.values()]).slope
