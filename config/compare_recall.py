# Which mechanism remembers how far, and what does it keep? The data: python data/recall/prepare.py
title = "Associative recall, equal steps"
out_dir = "out-compare-recall"
base = ["config/train_recall.py"]
variants = [
    "dense:",
    "local 8: --attention=sparse --window=8",
    "local 16: --attention=sparse --window=16",
    "local 32: --attention=sparse --window=32",
    "strided: --attention=sparse --sparse_pattern=strided",
    "fixed: --attention=sparse --sparse_pattern=fixed",
    "log: --attention=sparse --sparse_pattern=log --window=4",
    "adaptive span: --attention=adaptive_attention_span --softness_span_mask=8 --span_init=[8]",
    "adaptive span, periodic: --attention=adaptive_attention_span --softness_span_mask=8 --use_triangle_wave_masking=True",
    "ATRT: --attention=atrt",
]
amount = 800
evaluations = 4
