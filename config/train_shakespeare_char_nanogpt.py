# Tiny Shakespeare in nanoGPT's form and with the sizes of its recipe for a CPU, to compare config/train_shakespeare_char.py
# with: learned positions, LayerNorm, GELU, no n-grams, short texts.
out_dir = "out-shakespeare-char-nanogpt"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
pos = "learned"
norm = "layernorm"

batch_size = 12
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 2000
warmup_iters = 100
eval_interval = 250
eval_iters = 20
