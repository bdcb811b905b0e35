# Tiny Shakespeare as characters: five passes over the text, minutes on a CPU.
# So small a text is soon learnt by heart, so n-grams and activations are dropped: docs/results.md has the figures.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
batch_size = 4
dropout = 0.2
activation = "relu2"
ngram = 5
ngram_dropout = 0.5

max_iters = 5000
warmup_iters = 100
lr_schedule = "linear"
min_lr = 0.0
eval_interval = 1000
eval_iters = 0  # the whole validation split takes seconds
