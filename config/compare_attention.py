# Every mechanism on text: the unlabelled reviews as bytes (prepare them with data/imdb/prepare.py --tokenizer=bytes).
title = "Language models of reviews as bytes, equal steps"
out_dir = "out-compare-attention"
base = ["--dataset=imdb_bytes", "--task=lm", "--n_layer=2", "--n_head=4", "--n_embd=128", "--block_size=512", "--batch_size=8",
        "--learning_rate=3e-3", "--min_lr=3e-4", "--eval_iters=20", "--log_interval=100"]
variants = [
    "dense:",
    "adaptive span: --attention=adaptive_attention_span --span_init=[16,32,64,128]",
    "adaptive span, periodic: --attention=adaptive_attention_span --span_init=[16,32,64,128] --use_triangle_wave_masking=True",
    "local: --attention=sparse --window=64",
    "strided: --attention=sparse --sparse_pattern=strided",
    "fixed: --attention=sparse --sparse_pattern=fixed",
    "log: --attention=sparse --sparse_pattern=log --window=32",
    "ATRT: --attention=atrt",
]
seeds = [1, 2, 3]
amount = 300
evaluations = 3
