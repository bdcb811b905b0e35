# Does attention help a recurrent classifier? Reviews, the 10,000 commonest words, the first 200 words of each.
title = "BiLSTM on reviews: no attention, additive, multi-head"
out_dir = "out-compare-bilstm"
base = ["config/train_imdb.py", "--model=bilstm", "--n_embd=100", "--block_size=200", "--pool=max", "--dropout=0.5",
        "--batch_size=64", "--learning_rate=2e-3", "--min_lr=1e-4", "--weight_decay=0.1", "--log_interval=100"]
variants = ["none: --attention=none", "additive: --attention=additive", "multi-head: --attention=multihead"]
seeds = [1, 2, 3]
amount = 528  # one and a half passes
evaluations = 4
hard = "data/hard_reviews.jsonl"
