# The default run: bytes of Python's own standard library, no network, under two minutes on 2 cores.
# The model and its training are train.py's own defaults.
out_dir = "out-stdlib"
dataset = "stdlib"
