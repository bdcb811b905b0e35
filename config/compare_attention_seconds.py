# config/compare_attention.py with equal seconds instead of equal steps.
from config.compare_attention import *

title = "Language models of reviews as bytes, equal seconds"
out_dir = "out-compare-attention-seconds"
budget = "seconds"
amount = 15.0
