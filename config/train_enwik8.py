# enwik8 on one GPU: 12 layers of 512, the recipe of config/train_enwik8_cpu.py at full size. A billion bytes, 11 passes:
# meant for 25 minutes of an H100 with --compile=True, which nobody has measured yet.
out_dir = "out-enwik8"
dataset = "enwik8"

n_layer = 12
n_head = 8
n_embd = 512
block_size = 512
batch_size = 64
dropout = 0.1
activation = "relu2"
ngram = 6
ngram_rows = 262144
ngram_dropout = 0.2

learning_rate = 1e-3
lr_schedule = "linear"
min_lr = 0.0
max_iters = 30000
warmup_iters = 500
eval_interval = 1000
eval_iters = 100
log_interval = 50
eval_test = True

adaptive_attention_span = {"span_reg": 4e-6}  # used if this mechanism is chosen; its default is 2e-6
