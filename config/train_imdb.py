# Reviews as words, positive or negative: a small encoder on a CPU, in minutes.
out_dir = "out-imdb"
dataset = "imdb"

n_layer = 1  # a second layer or a third pass only overfits
n_head = 2
n_embd = 128
block_size = 512  # nine reviews in ten are shorter; the rest are cut
batch_size = 32
dropout = 0.6
weight_decay = 1.0

learning_rate = 5e-4
min_lr = 1e-5
max_iters = 1406  # two passes over 22,496 reviews
warmup_iters = 200
eval_interval = 352  # half a pass
eval_iters = 0
eval_test = True
log_interval = 50
