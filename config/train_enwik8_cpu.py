# enwik8 on a CPU, in minutes. The head of the file is enough: data/enwik8/prepare.py --source=FILE --partial
# The recipe of config/train_stdlib.py: narrow, many small steps, n-grams.
out_dir = "out-enwik8-cpu"
dataset = "enwik8"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
batch_size = 4
activation = "relu2"
ngram = 6
ngram_dropout = 0.2
ngram_sparse = True
ngram_lr = 40.0

max_iters = 5000
warmup_iters = 100
lr_schedule = "linear"
min_lr = 0.0
eval_interval = 1000
eval_iters = 100
