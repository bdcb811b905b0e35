# Does raising large weights help? A small encoder on reviews, ten passes, long enough to overfit.
title = "Encoder on reviews: dense attention against ATRT"
out_dir = "out-compare-atrt"
base = ["config/train_imdb.py", "--n_embd=32", "--block_size=128", "--dropout=0.3", "--batch_size=64", "--weight_decay=0.1",
        "--learning_rate=1e-3", "--min_lr=1e-4", "--eval_train=True", "--eval_iters=40", "--log_interval=100"]
variants = ["dense:", "ATRT, row: --attention=atrt", "ATRT, matrix: --attention=atrt --atrt_scope=matrix"]
amount = 3520  # ten passes
seeds = [1, 2, 3]
evaluations = 10  # one after each pass
hard = "data/hard_reviews.jsonl"
