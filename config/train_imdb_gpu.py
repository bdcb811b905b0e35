# Reviews on a GPU: a wider, deeper encoder that reads up to 1,024 words of each.
out_dir = "out-imdb-gpu"
dataset = "imdb"

n_layer = 4
n_head = 8
n_embd = 256
block_size = 1024
batch_size = 64
dropout = 0.3

learning_rate = 5e-4
min_lr = 1e-5
max_iters = 2109  # six passes
warmup_iters = 300
weight_decay = 0.1
eval_interval = 352
eval_iters = 0
patience = 4
eval_test = True
