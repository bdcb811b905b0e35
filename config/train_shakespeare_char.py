# Tiny Shakespeare as characters: two passes over the text, minutes on a CPU.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 8

learning_rate = 2e-3
max_iters = 1000
warmup_iters = 50
eval_interval = 250
eval_iters = 0  # the whole validation split takes seconds
