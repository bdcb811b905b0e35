# Every mechanism on enwik8 at full size. Needs a GPU; each run takes hours.
from config.compare_attention import variants

title = "enwik8, equal steps"
out_dir = "out-compare-enwik8"
base = ["config/train_enwik8.py"]
seeds = [1, 2, 3]
amount = 20000
evaluations = 20
