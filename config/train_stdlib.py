# The default run: bytes of Python's standard library, no network, minutes on 2 cores.
# Few tokens a second favour a narrow model, many small steps and embeddings of n-grams: docs/results.md has the figures.
out_dir = "out-stdlib"
dataset = "stdlib"

n_embd = 128
activation = "relu2"
zero_init = True
ngram = 8
ngram_sparse = True
ngram_lr = 40.0

batch_size = 4
max_iters = 1500
warmup_iters = 100
lr_schedule = "linear"
min_lr = 0.0
eval_interval = 500
