# Which mechanism remembers how far, and what does it keep? The data: python data/recall/prepare.py
title = "Associative recall, equal steps"
out_dir = "out-compare-recall"
base = ["config/train_recall.py"]
variants = [
    "dense:",
    "dense, one key head: --n_kv_head=1",
    "ALiBi: --attention=alibi --pos=none",
    "forgetting: --attention=forgetting",
    "ATRT: --attention=atrt",
    "local 8: --attention=sparse --window=8",
    "local 16: --attention=sparse --window=16",
    "local 32: --attention=sparse --window=32",
    "local 16, 5 global: --attention=sparse --window=16 --global_tokens=5",  # the mark and the pairs
    "strided: --attention=sparse --sparse_pattern=strided",
    "fixed: --attention=sparse --sparse_pattern=fixed",
    "log: --attention=sparse --sparse_pattern=log --window=4",
    "adaptive span: --attention=adaptive_attention_span --softness_span_mask=8 --span_init=[8]",
    "adaptive span, periodic: --attention=adaptive_attention_span --softness_span_mask=8 --use_triangle_wave_masking=True",
]
amount = 1000
evaluations = 4
