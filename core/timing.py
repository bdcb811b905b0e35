"""What calls cost, measured in turn, and the training step that compare.py and bench.py measure."""

import math
import statistics
import time
from typing import NamedTuple

import torch

from core import hardware


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
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
