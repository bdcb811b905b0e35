# Which attention on text, if each trains for the same time? enwik8 (data/enwik8/prepare.py), context 1,024.
title = "Wikipedia as bytes, context 1,024, equal seconds"
out_dir = "out-compare-text"
base = ["config/train_enwik8_cpu.py", "--block_size=1024", "--batch_size=1", "--eval_iters=40"]
variants = [
    "dense:",
    "local: --attention=sparse --window=128",
    "local, every fourth layer dense: --attention=sparse --window=128 --sparse_pattern=LLLD",
    "strided: --attention=sparse --sparse_pattern=strided",
    "log: --attention=sparse --sparse_pattern=log --window=32",
    "adaptive span: --attention=adaptive_attention_span --span_init=[16,32,64,128] --mask_lr=10",
    "adaptive span, periodic: --attention=adaptive_attention_span --span_init=[16,32,64,128] --mask_lr=10"
    " --use_triangle_wave_masking=True",
    "forgetting: --attention=forgetting",
    "ATRT: --attention=atrt",
]
budget = "seconds"
amount = 180.0
evaluations = 3
