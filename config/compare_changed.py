# A dense model goes on with another attention for a tenth of its steps: what is lost, and what is saved? First:
# python train.py config/train_enwik8_cpu.py --block_size=1024 --batch_size=1 --max_iters=2000 --out_dir=out-enwik8-dense
title = "Trained dense, then changed: Wikipedia as bytes, context 1,024"
out_dir = "out-compare-changed"
base = ["config/train_enwik8_cpu.py", "--block_size=1024", "--batch_size=1", "--init_from=out-enwik8-dense",
        "--learning_rate=1e-4", "--ngram_lr=4", "--eval_iters=40"]
variants = [
    "dense:",
    "local: --attention=sparse --window=128",
    "local, every fourth layer dense: --attention=sparse --window=128 --sparse_pattern=LLLD",
    "log: --attention=sparse --sparse_pattern=log --window=32",
    "adaptive span: --attention=adaptive_attention_span --span_init=[64,128,256,512] --mask_lr=10",
    "forgetting: --attention=forgetting",
]
amount = 200
evaluations = 4
