# The default run: bytes of Python's standard library, no network, under two minutes on 2 cores.
# Model and training use the defaults of train.py.
out_dir = "out-stdlib"
dataset = "stdlib"
