"""What must happen before a script imports torch; each script imports this module first.

OpenMP, in which PyTorch computes on a CPU: libgomp reads its settings when it is loaded. At the end of each parallel
region, threads wait for the last one. They spin for a while before they sleep, since a thread that spins resumes at
once. If other processes share the cores, the last thread may not be running: the others then spin through the time
slice that it waits for. A short spin keeps most of the speed on an idle machine, and frees the core on a busy one.
`python bench.py load` measures both.

Packages: if a package of the requirements files is missing, the script ends with exit code 2 and one line that says
which interpreter has it or which command installs it.
"""

import os
import sys

from core.config import missing_package, print_error, requirements_files

# Rounds of a spin; libgomp's default is 300,000, several milliseconds. Chosen by `bench.py load` (docs/speed.md,
# "Beside other processes"): no slower on an idle machine, and about half of the idle speed beside one busy process per
# core.
SPIN_COUNT = 20_000

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # a user's choice takes precedence
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def excepthook(kind, error, trace):
    """Handle an exception that no code caught: one line if a listed package is missing, else Python's traceback."""
    if isinstance(error, ModuleNotFoundError) and requirements_files(error):
        print_error(missing_package(error))
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = excepthook
