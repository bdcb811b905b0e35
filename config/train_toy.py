# Six sentences as words: small enough to inspect every weight. Trains in seconds.
out_dir = "out-toy"
dataset = "toy"

n_layer = 2
n_head = 2
n_embd = 16  # the MLP has 64 hidden units
block_size = 8
pos = "sinusoidal"
batch_size = 8

learning_rate = 1e-2
min_lr = 1e-3
max_iters = 300
warmup_iters = 20
eval_interval = 100
log_interval = 50
