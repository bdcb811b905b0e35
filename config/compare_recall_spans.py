# Do spans that begin at 8 grow to the distance that recall needs, if they learn at a higher rate than the other weights?
title = "Associative recall, the learning rate of spans"
out_dir = "out-compare-recall-spans"
base = ["config/train_recall.py", "--use_adaptive_attention=True", "--softness_span_mask=8", "--span_init=[8]"]
variants = [
    "rate of the weights:",
    "10 times: --mask_lr=10",
    "30 times: --mask_lr=30",
]
amount = 1000
evaluations = 4
