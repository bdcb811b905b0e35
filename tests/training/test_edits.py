"""Edits of train.py that people make, applied to a copy as text: they take few lines, resume, and work on two ranks."""

import pytest
from edited import edited_copy, train
from training_runs import assert_same_runs, log_of

from helpers import ROOT

EVALUATION = "                    run.record_evaluation(scores)  # log, ckpt.pt, best.pt\n"
FORWARD = "                    logits, loss = net(x, y, lengths)\n"
SCHEDULE = "    progress = min("
EDITS = {
    "sample": [(EVALUATION, EVALUATION + """\
                    model.eval()
                    idx = torch.zeros((1, 1), dtype=torch.long, device=dev)
                    print("sample:", model.generate(idx, 12, temperature=1.0)[0].tolist())
                    model.train()
""")],
    "second loss": [(FORWARD, FORWARD + """\
                    loss = loss + 0.1 * logits.float().logsumexp(-1).square().mean()  # keeps the logits small
""")],
    "schedule": [(SCHEDULE, """\
    if step >= 4:
        return learning_rate / (step - 2) ** 0.5
    progress = min(""")],
}


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """The run of train.py as it is."""
    out = tmp_path_factory.mktemp("plain") / "out"
    train(ROOT, out, text, "--dropout=0.2")
    return out


@pytest.mark.parametrize("name", EDITS)
def test_an_edit(name, plain, text, tmp_path):
    """It has an effect on the run, where it should, and a resumed run equals the unbroken one to the bit, with
    dropout."""
    assert all(new.count("\n") - old.count("\n") < 10 for old, new in EDITS[name])
    scripts = edited_copy(tmp_path, *EDITS[name])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    said = train(scripts, whole, text, "--dropout=0.2")
    assert said.count("sample: [0, ") == (3 if name == "sample" else 0)  # at steps 0, 3 and 6
    train(scripts, cut, text, "--dropout=0.2", "--max_iters=3")
    train(scripts, cut, text, "--dropout=0.2", "--init_from=resume")
    assert_same_runs(whole, cut)
    edited, unedited = ([(record["loss"], record.get("lr")) for record in log_of(out)] for out in (whole, plain))
    assert (edited == unedited) == (name == "sample")  # what is drawn for a sample changes no later step


def test_the_edits_on_two_ranks(text, tmp_path):
    """All three at once: two ranks equal one to rounding."""
    scripts, one, two = edited_copy(tmp_path, *sum(EDITS.values(), [])), tmp_path / "one", tmp_path / "two"
    train(scripts, one, text)
    train(scripts, two, text, ranks=2)
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a.get("lr") == b.get("lr")
