# The full-size run, for a GPU: 12 layers of 512 on 100 MB of Wikipedia as bytes.
out_dir = "out-enwik8"
dataset = "enwik8"

n_layer = 12
n_head = 8
n_embd = 512
block_size = 512
batch_size = 64
dropout = 0.1

learning_rate = 1e-3
min_lr = 1e-5
max_iters = 60000  # 2 billion bytes: 22 passes
warmup_iters = 1000
eval_interval = 1000
eval_iters = 100
log_interval = 50
eval_test = True

adaptive_attention_span = {"span_reg": 4e-6}  # used if this mechanism is chosen; its default is 2e-6
