"""Every attention mechanism trains, resumes and serves, by its name and options alone."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from mechanism_files import FILES, MY_ATTENTION
from training_runs import SHAPE, SMALL, assert_same_runs, fit, log_of

import sample
import train
from core import checkpoint as checkpoint_file
from core import run as run_module
from core import runs
from core.config import UserError
from core.inference import sample_next_token
from helpers import ROOT, call
from model import load

pytestmark = pytest.mark.usefixtures("quick")


SHARED = "--n_kv_head=1 --qk_norm=True --attention_sink=True"
OPTIONS = {  # more than the defaults, and small enough to leave something out of 16 tokens
    "adaptive_attention_span": [
        "--softness_span_mask=4 --span_init=[2,9] --span_reg=0.01",
        "--softness_span_mask=4 --span_init=[2,9] --span_reg=0.01 --use_triangle_wave_masking=True",
        "--softness_span_mask=4 --use_triangle_wave_masking=True --triangle_wave_harmonics=0 --snap_periods=True",
    ],
    "sparse": [f"--window=3 --stride=4 --sparse_pattern={pattern}" for pattern in ("local", "strided,fixed", "GD")]
    + [f"--window=3 --stride=4 --sparse_pattern=LS --pattern_by=head --global_tokens=2 {SHARED}"],
    "dense": ["", SHARED],
    "alibi": ["--pos=none", "--pos=none --alibi_learned=True"],
    "atrt": ["", "--atrt_renormalize=False --atrt_task=summarization"],
    "my_attention": ["--price=0.1 --start=[0.1,1.0]"],
}
CASES = [f"--attention={name} {options}".strip() for name in ["dense", *sorted(FILES), "my_attention"]
         for options in OPTIONS.get(name, [""])]
ONLY_REVIEWS = ["--attention=sparse --sparse_pattern=local --window=3 --global_tokens=2",
                "--attention=atrt --atrt_scope=matrix"]


@pytest.mark.parametrize("line, kind", [(line, kind) for line in CASES for kind in ("text", "reviews")]
                         + [(line, "reviews") for line in ONLY_REVIEWS], ids=str)
def test_every_mechanism(request, tmp_path, capsys, beside, line, kind):
    """By its name and options alone: it trains, resumes exactly, is evaluated as the reference is, and serves."""
    folder, line = request.getfixturevalue(kind), line.split()
    steps = ("--eval_interval=2", "--dropout=0.1", "--lr_decay_iters=4")
    assert not fit(tmp_path / "whole", folder, *line, *steps, "--max_iters=4")
    assert not fit(tmp_path / "cut", folder, *line, *steps, "--max_iters=2")
    half = torch.load(tmp_path / "cut" / "ckpt.pt")["model"]
    torch.manual_seed(0)  # the rest, too, the checkpoint knows
    assert not fit(tmp_path / "cut", folder, *steps, "--max_iters=4", "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    one, other = (json.loads((tmp_path / run / "config.json").read_text()) for run in ("whole", "cut"))
    assert one["options"] == other["options"] and one["settings"]["attention"] == other["settings"]["attention"]
    model, checkpoint = load(tmp_path / "whole" / "ckpt.pt")
    assert all(x.isfinite().all() for x in checkpoint["model"].values())
    still = {name.split(".")[-1] for name, x in checkpoint["model"].items() if torch.equal(x, half[name])}
    assert still == ({"period"} if "--snap_periods=True" in line else set())  # the loss reaches every other parameter
    *_, record, whole = log_of(tmp_path / "whole", "val")
    by_length = {"accuracy_by_length"} if kind == "reviews" else set()
    assert record["stats"] == [layer.attention.stats() for layer in model.layers] and record["step"] == 4
    assert all(0 < layer["kept_share"] <= 1 for layer in record["stats"])
    assert record["work_per_token"] == model.estimate_flops(16)
    assert whole.keys() == record.keys() | {"whole"} | by_length
    model = sharpen(tmp_path / "whole")
    capsys.readouterr()
    said = []
    for kernel in ("auto", "reference"):
        assert not fit(tmp_path / "whole", folder, "--eval_only=True", f"--kernel={kernel}")
        said += re.findall(r"val: loss ([\d.]+)", capsys.readouterr().out)
    assert len(said) == 2 and float(said[0]) == pytest.approx(float(said[1]), abs=2e-4)
    assert_it_serves(tmp_path / "whole", model, capsys)


def test_letters_are_explained_once(text, tmp_path, capsys):
    assert not fit(tmp_path, text, "--attention=sparse", "--sparse_pattern=LD", "--max_iters=0")
    line = "sparse_pattern LD: L local, D dense; a letter for each layer, repeated\n"
    assert capsys.readouterr().out.count(line) == 1


def sharpen(out):
    """Make the weights of a run large, and give its model: after four steps no token makes a difference to another."""
    for name in ("ckpt.pt", "best.pt"):
        checkpoint = torch.load(out / name)
        large = {name: 6 * x if x.dim() > 1 else x for name, x in checkpoint["model"].items()}
        checkpoint_file.save(out / name, {**checkpoint, "model": large})
    return load(out / "ckpt.pt")[0]


def assert_it_serves(out, model, capsys):
    """sample.py says what full passes through the reference kernel say: 60 drawn tokens, past the block; or labels."""
    texts = ["import os\n", "so good", "a film " * 9]
    common = (f"--out_dir={out}", "--checkpoint=ckpt.pt", "--device=cpu")
    reference, _ = load(out / "ckpt.pt", kernel="reference")
    if not model.config.causal:
        for text in texts:
            ids = torch.tensor([[0, *text.encode()]])[:, :16]
            p = torch.softmax(reference(ids)[0], -1)[0]
            for dtype, error in (("float32", 0.00051), ("bfloat16", 0.02)):
                assert not call(sample, *common, f"--start={text}", f"--dtype={dtype}")
                label, said = capsys.readouterr().out.split()[:2]
                assert float(said) == pytest.approx(p[["negative", "positive"].index(label)].item(), abs=error)
        return
    ids, random = torch.tensor([[*texts[0].encode()]]), torch.Generator().manual_seed(sample.seed)
    with torch.no_grad():
        for _ in range(60):
            ids = torch.cat([ids, sample_next_token(reference(ids)[0][:, -1], generator=random)[:, None]], 1)
    common += (f"--start={texts[0]}", "--temperature=1", "--top_k=0", "--max_new_tokens=60", "--num_samples=1")
    assert not call(sample, *common, "--dtype=float32")
    expected = bytes(ids[0].tolist()).decode("utf-8", "replace")
    assert capsys.readouterr().out == expected + "\n" + "-" * 40 + "\n"


def test_a_file_dropped_beside_the_scripts(text, tmp_path):
    """As its user does it: no line changed elsewhere, in a copy of the scripts where nothing is patched."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "core", tmp_path / "core")
    (tmp_path / "my_attention.py").write_text(MY_ATTENTION)
    (tmp_path / "mine.py").write_text("attention = 'my_attention'\nwidth = 5\nstart = [0.1, 1]\nname = ['a', 'b']\n")
    common = ("--out_dir=out", "--device=cpu", "--dtype=float32")
    training = (*SMALL, f"--dataset={text}", *common)
    lines = [("train.py", "mine.py", "--price=0.5", "--flat=True", "--max_iters=2", *training),
             ("train.py", "--max_iters=4", "--init_from=resume", "--attention=my_attention", "--width=4", *training),
             ("sample.py", "--start=the prompt", "--num_samples=1", "--max_new_tokens=20", *common),
             ("train.py", "mine.py", "--widht=3", *training)]
    program = f"""
import runpy, sys
for sys.argv in map(list, {lines!r}):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        print(sys.argv[0], "left with", left.code)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    first, resumed, sampled, refused = re.split(r"\.py left with ", done.stdout)[:-1]
    assert "my_attention attention by engine" in first and re.search("step 0: val .*, slopes 0.55 ", first), done.stderr
    assert "resume: from step 2 of 4" in resumed and "checkpoint: width was 5, is now 4" in resumed
    assert sampled.startswith("None\nthe prompt") and refused == "None\ntrain" and done.stdout.endswith(" 2\n")
    assert done.stderr.endswith("train.py: --widht: unknown key 'widht'; did you mean width?\n")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["options"] == {"width": 4, "price": 0.5, "start": [0.1, 1], "name": "a,b", "flat": True}
    slopes = [record["stats"][0]["slopes"] for record in log_of(tmp_path / "out", "val") if "whole" not in record]
    assert len(slopes) == 3 and slopes[0] == pytest.approx([0.1, 1.0])
    # flat: no part of the loss but the penalty moves them, across the resume
    assert slopes[0][0] > slopes[1][0] > slopes[2][0]


def test_options_follow_the_line_where_the_weights_allow(text, tmp_path, capsys):
    """Periods are snapped on a checkpoint for fine-tuning and evaluation; a wave that was not trained is refused."""
    adaptive = "--attention=adaptive_attention_span"
    assert not fit(tmp_path / "out", text, adaptive, "--use_triangle_wave_masking=True", "--max_iters=1")
    for how in ("--eval_only=True", "--init_from=resume"):
        assert not fit(tmp_path / "out", text, adaptive, "--snap_periods=True", "--max_iters=2", how)
        assert "checkpoint: snap_periods was False, is now True" in capsys.readouterr().out
    options = json.loads((tmp_path / "out" / "config.json").read_text())["options"]
    assert options["snap_periods"] and options["use_triangle_wave_masking"]
    assert not fit(tmp_path / "plain", text, adaptive, "--max_iters=1")
    with pytest.raises(UserError, match="such an option is chosen before training"):
        fit(tmp_path / "plain", text, adaptive, "--use_triangle_wave_masking=True", "--init_from=resume")


def test_the_penalty_is_in_the_gradient_and_not_in_the_logged_loss(text, tmp_path, beside):
    """Whatever the number of forward passes of a step."""
    for price, passes in ((0.0, 1), (30.0, 1), (30.0, 3)):
        assert not fit(tmp_path / f"{price}-{passes}", text, "--attention=my_attention", f"--price={price}",
                       "--max_iters=1",
                       f"--gradient_accumulation_steps={passes}", "--flat=True")
    free, priced, thrice = ([record for record in log_of(out, "train")][0] for out in sorted(tmp_path.iterdir()))
    assert free["loss"] == priced["loss"] and free["loss"] == pytest.approx(thrice["loss"], abs=0.1)
    expected = math.hypot(free["grad_norm"], 30 * math.sqrt(4))  # 2 layers of 2 heads
    assert priced["grad_norm"] == pytest.approx(expected, rel=1e-5) == pytest.approx(thrice["grad_norm"], rel=0.01)


def test_options_of_a_mechanism_in_a_config_file(text, tmp_path):
    (tmp_path / "x.py").write_text("attention = 'sparse'\nwindow = 3\nsparse_pattern = ['local', 'dense']\n")
    assert not fit(tmp_path / "file", text, tmp_path / "x.py", "--max_iters=2")
    assert not fit(tmp_path / "line", text, "--attention=sparse", "--window=3", "--sparse_pattern=local,dense",
                   "--max_iters=2")
    assert_same_runs(tmp_path / "file", tmp_path / "line")
    local, dense = (layer["kept_share"] for layer in log_of(tmp_path / "file", "val")[0]["stats"])
    assert local == (16 * 3 - 3) / (16 * 17 / 2) and dense == 1.0


def test_what_an_evaluation_says_of_the_mechanism(text, tmp_path, monkeypatch, capsys):
    """The mean over layers and heads of every number, whatever its name; and as much work as its plan has now."""
    layer = train.new_model(train.GPTConfig(**SHAPE)).layers[0].attention
    health = [{"kept_share": 0.25, "reach_of_it": [10, 1000.5]},
              {"kept_share": 0.2, "reach_of_it": [30.0, 3000], "kind": "x"}]
    assert runs.format_stats(health) == ", kept share 0.225, reach of it 1,010"
    assert runs.format_stats([{}, {"a": [], "b": "x", "c": -0.012345, "d": None}]) == ", c -0.0123"
    pairs, calls = [136, 120, 100, 50], []
    monkeypatch.setattr(type(layer), "stats", lambda self: dict(health[self.layer]))
    scored = run_module.health
    monkeypatch.setattr(run_module, "health", lambda model: calls.append(model) or scored(model))
    multiplied = lambda self, T: pairs[len(calls) - 1] if T == 16 and calls else 200  # noqa: E731
    monkeypatch.setattr(type(layer), "multiplied_pairs", multiplied)
    assert not fit(tmp_path, text, "--max_iters=7")
    records = log_of(tmp_path, "val")
    assert [record["stats"] for record in records] == [health] * 4
    assert [record["work_per_token"] for record in records] == \
        [6 * (12 * 16**2 * 2 + 16 * 256 + 2 * 16 * 2 * n / 16) for n in pairs]
    said = re.findall(r"^step (\d+): val .*, kept share 0.225, reach of it 1,010( \*)?$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _ in said] == [0, 5, 7]


def test_compiled_while_spans_change(text, tmp_path, asked):
    """The published command, smaller: accepted; and what it learns makes torch.compile start over no more often than
    dense attention does."""
    smaller = (f"--dataset={text}", *SMALL, "--eval_test=False", "--n_layer=1", "--learning_rate=0.3",
               "--warmup_iters=0")
    flags, graphs = ("--use_adaptive_attention=True", "--use_triangle_wave_masking=True", "--compile=True"), []
    for name, line in (("dense", ("--compile=True", "--max_iters=1")), ("periodic", (*flags, "--max_iters=12"))):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert not call(train, ROOT / "config" / "train_enwik8.py", *smaller, *line, f"--out_dir={tmp_path / name}")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(asked) == 2 and graphs[0] == graphs[1] > 0
    first, *_, last = [record["stats"][0] for record in log_of(tmp_path / "periodic", "val")]
    assert all(abs(a - b) > 0.2 for name in ("spans", "periods") for a, b in zip(first[name], last[name]))
