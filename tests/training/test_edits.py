"""Edits of train.py that people make, applied to a copy as text: they take few lines, resume, and work on two ranks."""

import pytest
from edited import edited_copy, train
from training_runs import assert_same_runs, log_of

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


@pytest.mark.parametrize("name", EDITS)
def test_an_edit(name, text, tmp_path):
    """A resumed run equals the unbroken one to the bit, with dropout; two ranks equal one to rounding."""
    assert all(new.count("\n") - old.count("\n") < 10 for old, new in EDITS[name])
    scripts = edited_copy(tmp_path, *EDITS[name])
    whole, cut, one, two = (tmp_path / each for each in ("whole", "cut", "one", "two"))
    said = train(scripts, whole, text, "--dropout=0.2")
    assert said.count("sample: [0, ") == (3 if name == "sample" else 0)  # at steps 0, 3 and 6
    train(scripts, cut, text, "--dropout=0.2", "--max_iters=3")
    train(scripts, cut, text, "--dropout=0.2", "--init_from=resume")
    assert_same_runs(whole, cut)
    train(scripts, one, text)
    train(scripts, two, text, ranks=2)
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a.get("lr") == b.get("lr")


def test_the_edits_have_an_effect(text, tmp_path):
    losses = {}
    for name, changes in {"plain": [], **EDITS}.items():
        (tmp_path / name).mkdir()
        train(edited_copy(tmp_path / name, *changes), tmp_path / name / "out", text, "--dropout=0.2")
        losses[name] = [(record["loss"], record.get("lr")) for record in log_of(tmp_path / name / "out")]
    assert losses["sample"] == losses["plain"]  # what it draws changes no later step
    assert losses["second loss"] != losses["plain"] != losses["schedule"]
