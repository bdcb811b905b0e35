# Associative recall: which value was stored with this key? Two layers of dense attention learn it.
out_dir = "out-recall"
dataset = "recall"

n_layer = 2
n_head = 2
n_embd = 64
block_size = 64
batch_size = 16

learning_rate = 4e-3
min_lr = 2e-4
max_iters = 800
warmup_iters = 40
eval_interval = 100
eval_iters = 4
log_interval = 50
