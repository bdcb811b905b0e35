# Associative recall: which value stood behind this key? Two layers of dense attention learn it in MINUTES.
out_dir = "out-recall"
dataset = "recall"

n_layer = 2
n_head = 4
n_embd = 64
block_size = 64
batch_size = 16

learning_rate = 4e-3
min_lr = 2e-4
max_iters = 2500
warmup_iters = 75
eval_interval = 250
eval_iters = 0
log_interval = 50
