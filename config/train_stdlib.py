# The default: bytes of Python's own standard library, no network, under two minutes on 2 cores.
out_dir = "out-stdlib"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 16  # small steps, many of them: a CPU is as busy with 4,096 tokens as with more

learning_rate = 2e-3
max_iters = 300
warmup_iters = 30
eval_interval = 100
eval_iters = 10
