# Generated opinions of films, positive or negative: a toy classifier for the demo. Trains in seconds.
out_dir = "out-sentences"
dataset = "sentences"

n_layer = 2
n_head = 2
n_embd = 32
block_size = 64  # the longest sentence has 23 tokens
batch_size = 32
dropout = 0.1

learning_rate = 3e-3
min_lr = 1e-4
max_iters = 600  # four passes
warmup_iters = 50
eval_interval = 150
eval_iters = 0
log_interval = 25
