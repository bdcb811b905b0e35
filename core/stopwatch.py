"""The times of a run: of training alone, with evaluations, and the remaining time."""

import contextlib
import time
from collections import deque

RECENT = 5  # laps that the time left is estimated from: what else the machine does changes within minutes


class Stopwatch:
    """Measures a training loop that logs a lap of one or more steps at a time, and evaluates now and then."""

    def __init__(self, before=0.0):
        """before: seconds of the run's earlier processes, up to the checkpoint that it resumes from."""
        self.start = self.lap_start = time.perf_counter()
        self.start -= before
        self.first = True
        self.laps = deque(maxlen=RECENT)  # (steps, seconds), of training alone
        self.per_batch = 0.0  # seconds of the latest evaluation per batch, with its checkpoint

    def seconds(self):
        """Seconds of the loop so far, evaluations and earlier processes included."""
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def evaluating(self, batches):
        """Within it an evaluation of so many batches takes place, which is no part of a lap."""
        before = time.perf_counter()
        yield
        seconds = time.perf_counter() - before
        self.lap_start += seconds
        self.per_batch = seconds / batches

    def lap(self, steps):
        """End a lap of so many steps; return its seconds. `left` ignores the first lap, whose first step takes
        longer."""
        now = time.perf_counter()
        seconds, self.lap_start = now - self.lap_start, now
        if not self.first:
            self.laps.append((steps, seconds))
        self.first = False
        return seconds

    def left(self, steps, batches):
        """Seconds for so many steps at the speed of recent laps and evaluations of so many batches; None in the first
        two laps."""
        if not self.laps:
            return None
        done, seconds = map(sum, zip(*self.laps))
        return steps * seconds / done + batches * self.per_batch
