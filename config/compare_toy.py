# Six sentences as words: which next word does each mechanism predict? Takes minutes.
title = "Six sentences, next word"
out_dir = "out-compare-toy"
base = ["config/train_toy.py", "--log_interval=100"]
variants = [
    "dense:",
    "adaptive span: --attention=adaptive_attention_span --softness_span_mask=4",
    "local: --attention=sparse --window=2",
    "strided: --attention=sparse --sparse_pattern=strided",
    "ATRT: --attention=atrt",
]
amount = 300
evaluations = 3
_sentences = ("i love deep learning", "i love artificial intelligence", "deep learning is fun",
              "artificial intelligence is cool", "i love models", "models learn patterns")
prompts = list(dict.fromkeys(" ".join(s.split()[:n]) for s in _sentences for n in range(1, len(s.split()))))
