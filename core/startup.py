"""Settings of OpenMP, in which PyTorch computes on a CPU. Import this before torch: libgomp reads them when it is loaded.

At the end of each parallel region, threads wait for the last one. They spin for a while before they sleep, since a thread
that spins goes on at once. If other processes share the cores, the last thread may not be running: the others then spin
through the time slice that it waits for. A short spin keeps most of the speed on an idle machine, and gives the core away
on a busy one. `python bench.py load` measures both.
"""

import os

# Rounds of a spin; libgomp's own number is 300,000, several milliseconds. Chosen by `bench.py load` (README, "Beside other
# processes"): no slower than that on an idle machine, and about half of the idle speed beside one busy process a core.
SPIN_COUNT = 20_000

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's own choice stays
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
