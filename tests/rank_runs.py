"""Runs of train.py in several ranks, and whether two runs are the same.

Most ranks are processes forked from one server that has imported torch.
"""

import pytest
from edited import free_port
from fault_injection import end, program
from training_runs import log_of

from model import load

MAX = 8
SHAPE = ("--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=6", "--warmup_iters=2",
         "--eval_interval=4",
         "--eval_iters=3", "--log_interval=1", "--device=cpu", "--dtype=float32", f"--max_iters={MAX}",
         f"--lr_decay_iters={MAX}",
         "--learning_rate=1e-3", "--min_lr=1e-4")
KINDS = {
    "text": ("text", ()),
    "accumulated": ("text", ("--gradient_accumulation_steps=4", "--batch_size=3")),
    "uneven": ("text", ("--gradient_accumulation_steps=3", "--batch_size=5", "--grad_clip=0.2")),
    "recall": ("recall", ("--batch_size=3", "--gradient_accumulation_steps=3", "--eval_test=True")),
    "reviews": ("reviews", ("--batch_size=3", "--eval_test=True")),
    "span": ("text", ("--attention=adaptive_attention_span", "--use_triangle_wave_masking=True", "--span_reg=1e-3",
                      "--softness_span_mask=4", "--grad_clip=0.5", "--gradient_accumulation_steps=2")),
    "layernorm": ("text", ("--norm=layernorm", "--bias=True", "--pos=learned", "--tie=False")),
    "sparse tables": ("text", ("--ngram=3", "--ngram_rows=40", "--ngram_dim=4", "--ngram_sparse=True", "--ngram_lr=5",
                               "--grad_clip=0.5", "--gradient_accumulation_steps=2", "--batch_size=5")),
    "bilstm": ("reviews", ("--model=bilstm", "--attention=additive", "--hidden=8")),
}


def begin(world, out, data, *arguments, faults=(), of=1):
    """The processes of a run; `faults`: of one of them."""
    line, port = [f"--out_dir={out}", f"--dataset={data}", *SHAPE, *arguments], free_port()
    if world == 1:
        return [program("train", *line, faults=faults)]
    return [program("train", *line, faults=[("as_rank", (rank, world, port)), *(faults if rank == of else ())])
            for rank in range(world)]


def fit(world, out, data, *arguments, faults=()):
    """What each rank of a run said, which ends well."""
    ends = [end(process) for process in begin(world, out, data, *arguments, faults=faults)]
    assert {code for code, _ in ends} == {0}, ends
    return [said for _, said in ends]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, request):
    """A function: the folder of a kind's run in one process, made once."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("alone") / kind
            fit(1, made[kind], request.getfixturevalue(KINDS[kind][0]), *KINDS[kind][1])
        return made[kind]

    return run


def assert_close(one, other, tolerance=1e-6):
    """Two runs are the same within float32 rounding: each line of the log, the weights, AdamW's state, the best
    weights."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["split"]) == (b["step"], b["split"])
        for key in ("loss", "grad_norm", "bits_per_byte", "auc", "work"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=tolerance, abs=tolerance), (key, a, b)
    for name in ("ckpt.pt", "best.pt"):
        (a, facts), (b, others) = load(one / name), load(other / name)
        assert facts["state"]["step"] == others["state"]["step"]
        assert facts["state"]["best_step"] == others["state"]["best_step"]
        for key, weight in a.state_dict().items():
            assert (weight - b.state_dict()[key]).abs().max() < tolerance, key
