# Reviews, word by word, good or bad: a small encoder on a CPU, in minutes.
out_dir = "out-imdb"
dataset = "imdb"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 512  # nine reviews in ten are shorter; the rest are cut
batch_size = 32
dropout = 0.2

learning_rate = 1e-3
min_lr = 1e-5
max_iters = 2816  # four passes over 22,496 reviews
warmup_iters = 200
weight_decay = 0.1
eval_interval = 352  # half a pass
eval_iters = 0
eval_test = True
