# enwik8 on a CPU, in minutes. The head of the file is enough: data/enwik8/prepare.py --source=FILE --partial
out_dir = "out-enwik8-cpu"
dataset = "enwik8"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 16

learning_rate = 2e-3
max_iters = 1500
warmup_iters = 100
eval_interval = 500
