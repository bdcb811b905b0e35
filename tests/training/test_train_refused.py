"""What train.py refuses, before anything is written."""


import pytest
from training_runs import SMALL

import train
from core.config import UserError, plain_values
from core.mechanisms import mechanisms

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("argument, said", [
    ("--dataset=stdlb", "no dataset 'stdlb'"),
    ("--dtype=float16", "training expects dtype 'auto', 'float32' or 'bfloat16', got 'float16'"),
    ("--dtype=float31", "unknown dtype 'float31'; did you mean"),
    ("--device=gpu", "unknown device 'gpu'"), ("--attention=denze", "unknown attention 'denze'; did you mean dense?"),
    ("--attention=atr", "unknown attention 'atr'; did you mean atrt?"),
    ("--use_triangle_wave_masking=True",
     "'use_triangle_wave_masking'; it belongs to --attention=adaptive_attention_span"),
    ("--attention=sparse --span_reg=0", "'span_reg'; it belongs to --attention=adaptive_attention_span"),
    ("--attention=sparse --windo=3", "unknown key 'windo'; did you mean window?"),
    ("--attention=sparse --sparse_pattern=locl", "unknown sparse_pattern 'locl'; did you mean local?"),
    ("--attention=sparse --sparse_pattern=local,zzz",
     "unknown sparse_pattern 'zzz'; there are dense, fixed, local, log"),
    ("--attention=sparse --window=0", "window must be from 1 to 16,777,216, got 0"),
    ("--attention=atrt --atrt_scope=rows", "unknown atrt_scope 'rows'; did you mean row?"),
    ("--attention=atrt --atrt_scope=matrix", "atrt_scope"),
    ("--attention=atrt --atrt_task=zzz", "unknown atrt_task 'zzz'"),
    ("--use_adaptive_attention=1", "use_adaptive_attention expects bool (like False), got int 1"),
    ("--use_adaptive_attention=True --span_init=20", "span_init expects list (like []), got int 20"),
    ("--use_adaptive_attention=True --softness_span_mask=0",
     "softness_span_mask at least 1, both at most 16,777,216; got 0, 0"),
    ("--use_adaptive_attention=True --period_min_triangle_wave_masking=9", "period_m"),
    ("--pos=rop", "unknown pos 'rop'; did you mean rope?"), ("--norm=batchnorm", "unknown norm 'batchnorm'"),
    ("--pool=sum", "unknown pool 'sum'"), ("--kernel=fast", "unknown kernel 'fast'"),
    ("--init_from=gpt2", "unknown init_from 'gpt2'"), ("--lr_schedule=step", "unknown lr_schedule 'step'"),
    ("--task=classify", "holds lm data; task expects"), ("--batchsize=3", "did you mean batch_size?"),
    ("--n_embd=18", "n_embd must be a multiple of 4"), ("--n_embd=17", "n_embd must be a multiple of"),
    ("--batch_size=0", "batch_size must be at least 1, got 0"), ("--block_size=0", "block_size must be at least 1"),
    ("--n_layer=-1", "n_layer must be at least 1, got -1"),
    ("--n_layer=100000", "n_layer must be at most 10,000, got 100,000"),
    ("--n_head=0", "n_head must be at least 1"),
    ("--gradient_accumulation_steps=0", "gradient_accumulation_steps must be at least 1"),
    ("--eval_interval=0", "eval_interval must be at least 1"), ("--log_interval=0", "log_interval must be at least 1"),
    ("--max_iters=-1", "max_iters must be at least 0"), ("--eval_iters=-1", "eval_iters must be at least 0"),
    ("--patience=-1", "patience must be at least 0"), ("--warmup_iters=-1", "warmup_iters must be at least 0"),
    ("--seed=-1", "seed must be at least 0"), ("--grad_clip=-1", "grad_clip must be at least 0"),
    ("--learning_rate=-1", "learning_rate must be at least 0"),
    ("--weight_decay=-1", "weight_decay must be at least 0"),
    ("--beta2=1", "beta2 must be below 1"), ("--dropout=1", "dropout must be at least 0 and below 1"),
    ("--document_mask=True", "document_mask expects data whose documents begin with a mark; this data has none"),
    ("--align_documents=True", "align_documents expects documents that begin with a mark"),
    ("no_such_config.py", "cannot read config file"),
])
def test_refused(text, tmp_path, refused, argument, said):
    assert said in refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL, *argument.split())
    assert not (tmp_path / "out").exists()


def test_refused_with_the_mechanisms_that_exist(text, tmp_path, refused):
    """Our own and those of files that a user has put beside them."""
    line = [f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL]
    said = refused(train, *line, "--attention=zzz")
    assert f"unknown attention 'zzz'; there are {', '.join(sorted(mechanisms()))}" in said
    assert {"adaptive_attention_span", "atrt", "dense", "sparse"} <= set(mechanisms())
    owners = refused(train, *line, "--window=64").partition("unknown key 'window'; it belongs to --attention=")[2]
    assert "sparse" in owners.split(" or ")


def test_check_reads_its_settings_alone(monkeypatch):
    """Not those that train.py has at the moment: compare.py asks it about runs that have not begun."""
    settings = plain_values(vars(train))
    for key, bad, said in (("out_dir", "", "out_dir expects"), ("seed", 2**63, "seed must be below"),
                           ("dropout", 1.0, "dropout must"),
                           ("init_from", "x", "unknown init_from"), ("dtype", "float16", "training expects dtype"),
                           ("gradient_accumulation_steps", 10**7, "at most 1000000 forward passes")):
        with pytest.raises(UserError, match=said):
            train.check({**settings, key: bad})
        monkeypatch.setattr(train, key, bad)
    train.check(settings)
