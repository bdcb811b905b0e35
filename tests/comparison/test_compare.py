"""Comparisons: what is run and not run again, budgets, the statistics against other ways to them, the table."""

import json
import math
import os
import signal
import statistics

import numpy as np
import pytest
import torch

import compare
import train
from core import dist, hardware, stats, timing
from core.report import summarize
from helpers import ROOT, call
from model import load

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=8", "--dtype=float32", "--log_interval=50", "--device=cpu"]
HARD = [{"text": "so good", "label": 1, "kind": "plain"}, {"text": "not so good", "label": 0, "kind": "negation"}]


@pytest.fixture
def timed(monkeypatch, quick):
    """Steps of `dense` take a second, of everything else two."""
    def side_by_side(calls, *_, **__):
        calls[0]()  # it can be called
        return [timing.Cost(5.0 * (1 if n == 0 else 2), 0, 1) for n in range(len(calls))]

    monkeypatch.setattr(timing, "side_by_side", side_by_side)
    monkeypatch.setattr(compare, "draw", lambda path: None)


def settings(folder, data, *variants, **more):
    """The arguments of a small comparison."""
    base = [f"--dataset={data}", "--block_size=16", "--batch_size=4", "--eval_iters=1", *SMALL]
    chosen = {"out_dir": folder, "base": base,
              "variants": list(variants or ["dense:", "local: --attention=sparse --window=3"]),
              "seeds": [1, 2], "amount": 4, "evaluations": 2, "resamples": 100, **more}
    return [f"--{key}={value}" for key, value in chosen.items()]


def read(folder):
    return json.loads((folder / "comparison.json").read_text())


def test_text(text, tmp_path, timed, monkeypatch):
    """Every variant and seed runs once, the table tells all, and a second call trains nothing."""
    trained = []
    run_training = compare.run_training
    monkeypatch.setattr(compare, "run_training", lambda arguments: trained.append(arguments) or run_training(arguments))
    call(compare, *settings(tmp_path, text, prompts=["import "]))
    summary = read(tmp_path)
    assert len(trained) == 4 and [row["variant"] for row in summary["variants"]] == ["dense", "local"]
    assert [(r["variant"], r["seed"])
            for r in summary["runs"]] == [("dense", 1), ("local", 1), ("dense", 2), ("local", 2)]
    for run in summary["runs"]:
        assert [step for step, _ in run["curve"]] == [0, 2, 4]
        assert run["scores"]["bits_per_byte"] == pytest.approx(run["scores"]["loss"] / math.log(2))
        model, _ = load(tmp_path / f"{run['variant']}-{run['seed']}" / "best.pt")
        assert run["work"] == pytest.approx(4 * 4 * 16 * model.estimate_flops(16))
    dense, local = summary["variants"]
    assert dense["difference"] is None and dense["minutes"] == pytest.approx(4 / 60)
    assert local["minutes"] == pytest.approx(8 / 60)
    assert dense["kept_share"] == 1 and local["kept_share"] == pytest.approx(45 / 136)
    a, b = (np.array([r["scores"]["bits_per_byte"] for r in summary["runs"] if r["variant"] == name])
            for name in ("dense", "local"))
    t = (b - a).mean() / ((b - a).std(ddof=1) / 2**0.5)  # one degree of freedom: Cauchy's distribution
    assert local["difference"]["p"] == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)))
    half = math.tan(0.475 * math.pi) * (b - a).std(ddof=1) / 2**0.5
    assert local["difference"]["high"] - (b - a).mean() == pytest.approx(half)
    told = (tmp_path / "comparison.md").read_text()
    for said in ("2 seeds", "the same steps, 4", "val split", "products in float32", "| dense |", "| local |", "33%",
                 "import "):
        assert said in told
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [1, 1, 2, 2]
    assert not list(tmp_path.glob("*/ckpt.pt")) and len(list(tmp_path.glob("*/best.pt"))) == 4
    trained.clear()
    call(compare, *settings(tmp_path, text, prompts=["import "]))
    assert trained == [] and read(tmp_path) == {**summary, "command": read(tmp_path)["command"]}
    call(compare, *settings(tmp_path, text, prompts=["import "], seeds=[1, 2, 3]))
    assert [[a for a in arguments if "seed" in a] for arguments in trained] == 2 * [["--seed=3"]]


def test_the_same_data_for_all(text, tmp_path, timed, monkeypatch):
    """Variants see the same batches in the same order; seeds see others."""
    seen, run_training, micro_batches = {}, compare.run_training, dist.micro_batches

    def train_watched(arguments):
        key = ("sparse" if "--attention=sparse" in arguments else "dense", next(a for a in arguments if "--seed=" in a))

        def watched(*inputs):
            for batch in micro_batches(*inputs):
                seen.setdefault(key, []).append(batch[0].tolist())
                yield batch

        monkeypatch.setattr(dist, "micro_batches", watched)
        return run_training(arguments)

    monkeypatch.setattr(compare, "run_training", train_watched)
    call(compare, *settings(tmp_path, text))
    one, two = "--seed=1", "--seed=2"
    assert seen["dense", one] == seen["sparse", one] != seen["dense", two] == seen["sparse", two]
    assert len(seen["dense", one]) == 4


def test_warm_starts(text, tmp_path, timed, monkeypatch):
    """Runs begin with the weights and the shape of another run, go on after a signal, and are run anew once it
    changed."""
    assert call(train, f"--dataset={text}", f"--out_dir={tmp_path / 'base'}", *SMALL, "--n_embd=16", "--block_size=16",
                "--batch_size=4", "--eval_iters=1", "--max_iters=3", "--eval_interval=1") is None
    base = [f"--dataset={text}", "--batch_size=4", "--eval_iters=1", "--dtype=float32", "--device=cpu"]
    warm = f"--init_from={tmp_path / 'base'}"
    local = f"local: {warm} --attention=sparse --window=3"
    arguments = settings(tmp_path / "out", text, f"on: {warm}", local, base=base)
    trained, run_training, micro_batches, sent = [], compare.run_training, dist.micro_batches, []

    def interrupt(*inputs):
        if len(trained) == 2 and inputs[2] == 3 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return micro_batches(*inputs)

    monkeypatch.setattr(dist, "micro_batches", interrupt)
    monkeypatch.setattr(compare, "run_training", lambda arguments: trained.append(arguments) or run_training(arguments))
    assert call(compare, *arguments) == 128 + signal.SIGTERM
    call(compare, *arguments)
    assert len(trained) == 5 and trained[2][-1] == "--init_from=resume" and sent
    best = torch.load(tmp_path / "base" / "best.pt")["state"]["best"]
    on, *_ = runs = read(tmp_path / "out")["runs"]
    assert on["curve"][0] == [0, pytest.approx(best / math.log(2), rel=1e-5)]
    assert all(run["work"] > 0 for run in runs)
    config = json.loads((tmp_path / "out" / "local-1" / "config.json").read_text())
    assert (config["settings"]["n_embd"], config["settings"]["attention"]) == (16, "sparse")
    call(compare, *arguments)
    assert len(trained) == 5
    call(train, f"--dataset={text}", f"--out_dir={tmp_path / 'other'}", *SMALL, "--n_embd=16", "--block_size=16",
         "--batch_size=4", "--eval_iters=1", "--max_iters=1", "--eval_interval=1")
    for name in ("best.pt", "ckpt.pt"):
        (tmp_path / "other" / name).replace(tmp_path / "base" / name)
    call(compare, *arguments)
    assert len(trained) == 9


def test_one_precision_for_all(text, tmp_path, timed, monkeypatch):
    """What was chosen when the steps were timed holds for runs that are added later, whatever the machine says then."""
    arguments = settings(tmp_path, text, amount=2)
    arguments = [a.replace("'--dtype=float32', ", "") for a in arguments]
    call(compare, *arguments)
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, dtype: 4e9 if dtype == "bfloat16" else 1e9)
    call(compare, *arguments, "--seeds=[1, 2, 3]")
    configs = [json.loads(file.read_text()) for file in tmp_path.glob("*/config.json")]
    assert len(configs) == 6 and {config["dtype"] for config in configs} == {read(tmp_path)["dtype"]} == {"float32"}


@pytest.mark.parametrize("budget, amount, steps",
                         [("steps", 6, (6, 6)), ("seconds", 6, (6, 3)), ("work", None, (8, 16))])
def test_budgets(budget, amount, steps, monkeypatch):
    """Equal seconds are fewer steps of a slower variant; equal work more of one that does less."""
    costs = [{"seconds_per_step": 1.0, "work_per_step": 3e12}, {"seconds_per_step": 2.0, "work_per_step": 1.5e12}]
    monkeypatch.setattr(compare, "budget", budget)
    monkeypatch.setattr(compare, "amount", amount or 24.0)
    assert tuple(map(compare.steps_of, costs)) == steps


def test_what_a_step_costs(reviews, tmp_path, monkeypatch, quick):
    """Timed are five batches from short to long, the weights stay as they are, and work is the mean over fifty."""
    monkeypatch.setattr(compare, "base", [f"--dataset={reviews}", "--block_size=96", "--batch_size=2", *SMALL])
    variant = compare.parse("dense:")
    call_five, work, count = compare.typical_steps(variant, "cpu", "float32")
    model, source = compare.set_up(variant, "cpu")
    seen, training_step = [], timing.training_step

    def watched(model, net, optimizer, batches, *rest):
        batches = list(batches)
        seen.append((model, batches))
        training_step(model, net, optimizer, batches, *rest)

    monkeypatch.setattr(timing, "training_step", watched)
    call_five()
    widths = [batches[0][0].size(1) for _, batches in seen]
    assert len(seen) == 5 and widths == sorted(widths) and widths[0] < widths[-1]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0].state_dict().values(), model.state_dict().values()))
    every = [source.batch(step)[0] for step in range(50)]
    assert work == pytest.approx(sum(x.numel() * model.estimate_flops(x.size(1)) for x in every) / 50)
    assert count == model.parameter_count()


def test_reviews(reviews, tmp_path, timed):
    """Classifiers: scores of the test split, McNemar by hand, training accuracy, hard reviews."""
    hard = tmp_path / "hard.jsonl"
    hard.write_text("".join(json.dumps(row) + "\n" for row in HARD))
    variants = ["bag: --model=bilstm --attention=none --hidden=4",
                "additive: --model=bilstm --attention=additive --hidden=4", "dense:"]
    arguments = settings(tmp_path / "out", reviews, *variants, amount=10, hard=str(hard))
    base = [f"--dataset={reviews}", "--block_size=24", "--batch_size=8", "--eval_iters=0", "--eval_test=True",
            "--eval_train=True",
            "--learning_rate=0.02", *SMALL]
    call(compare, *arguments, f"--base={base}")
    summary = read(tmp_path / "out")
    assert summary["kind"] == "classify" and summary["score"] == "accuracy" and summary["split"] == "test"
    for row in summary["variants"]:
        assert set(row["scores"]) == {"accuracy", "f1", "precision", "recall", "auc",
                                      "loss"} and set(row["hard"]) == {"plain", "negation"}
        assert 0 <= row["train_first"] <= 1 and 0 <= row["train_last"] <= 1 and row["spread"] >= 0
    loaded = {}
    for name in ("bag", "additive", "dense"):
        for seed in (1, 2):
            with np.load(tmp_path / "out" / f"{name}-{seed}" / "predictions-test.npz") as found:
                loaded[name, seed] = (found["p"] > 0.5) == found["label"]
    for name in ("additive", "dense"):
        difference = next(row for row in summary["variants"] if row["variant"] == name)["difference"]
        assert difference["verdict"] in ("better", "worse",
                                         "no difference shown") and difference["p_holm"] >= difference["p"]
        for seed, test in zip((1, 2), difference["mcnemar"]):
            a = sum(x and not y for x, y in zip(loaded["bag", seed], loaded[name, seed]))
            b = sum(y and not x for x, y in zip(loaded["bag", seed], loaded[name, seed]))
            assert (test["only_first"], test["only_this"]) == (a, b)
            tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
            assert test["p"] == pytest.approx(min(1, 2 * tail if a != b else 1))
    told = (tmp_path / "out" / "comparison.md").read_text()
    assert "McNemar" in told and "negation" in told and "training split, last" in told


def test_bootstrap_against_formulas():
    """Over texts alone, over seeds alone, and over both the error is what the variances add up to."""
    random = np.random.default_rng(5)
    def compare_error(x):
        return stats.standard_error(x.astype(np.float32), np.random.default_rng(1), 2000)

    texts = np.tile(random.choice([-1, 0, 1], 4000), (6, 1))  # seeds agree
    assert compare_error(texts) == pytest.approx(texts[0].std() / 4000**0.5 * (6 / 5) ** 0.5, rel=0.05)
    seeds = np.tile(random.normal(size=(6, 1)), (1, 4000))  # texts agree
    assert compare_error(seeds) == pytest.approx(seeds[:, 0].std(ddof=1) / 6**0.5, rel=0.05)
    assert compare_error(seeds + texts) == pytest.approx(math.hypot(compare_error(seeds), compare_error(texts)),
                                                         rel=0.05)
    one = np.array([0.1, 0.3, -0.2, 0.4])
    assert stats.standard_error(one) == pytest.approx(statistics.stdev(one) / 2)


@pytest.mark.parametrize("df, t", [(1, 12.70620), (2, 4.302653), (5, 2.570582), (11, 2.200985)])
def test_student(df, t):
    """Against the tables: 5 % lie outside."""
    assert stats.chance(t, df) == pytest.approx(0.05, abs=1e-6) and stats.chance(-t, df) == stats.chance(t, df)
    assert stats.interval(1, 2, df + 1)["high"] == pytest.approx(1 + 2 * t, rel=1e-5)
    assert stats.chance(0, df) == 1


def test_mcnemar():
    assert stats.mcnemar(0, 0) == stats.mcnemar(5, 5) == 1 and stats.mcnemar(0, 6) == stats.mcnemar(6, 0) == 2 / 64
    assert stats.mcnemar(1, 7) == stats.mcnemar(7, 1) == 2 * (1 + 8) / 256


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def test_intervals_hold_the_truth():
    """Of 400 made-up comparisons of 4 seeds 95 % of the intervals hold the difference that was put in."""
    random, held = np.random.default_rng(2), 0
    for _ in range(400):
        values = 0.3 + random.normal(size=4)
        found = stats.interval(values.mean(), stats.standard_error(values), 4)
        held += found["low"] <= 0.3 <= found["high"]
    assert 0.92 < held / 400 < 0.98


@pytest.mark.parametrize("a, b, verdict",
                         [((3, 3.1, 3.2), (2, 2.1, 2.2), "better"), ((2, 2.1, 2.2), (3, 3.1, 3.2), "worse"),
                          ((2, 3, 4), (3, 2, 4.1), "no difference shown"),
                          ((2, 2, 2), (2, 2, 2), "no difference shown")])
def test_verdicts(a, b, verdict):
    """Fewer bits are better, and what the seeds do not show is not claimed."""
    runs = {name: [{"variant": name, "seed": n, "steps": 4, "work": 1.0, "kept_share": 1.0, "split": "val",
                    "curve": [[0, 9.0]],
                    "scores": {"bits_per_byte": x + n / 1000, "loss": x}} for n, x in enumerate(values)]
            for name, values in (("first", a), ("second", b))}
    cost = {"parameters": 1, "seconds_per_step": 1.0, "work_per_step": 1.0}
    assert summarize(runs, {"first": cost,
                            "second": cost}, None, 100)["variants"][1]["difference"]["verdict"] == verdict


@pytest.mark.parametrize("change, said", [
    ({"budget": "hours"}, "unknown budget 'hours'"), ({"amount": 0}, "amount must be above 0"),
    ({"seeds": [1]}, "at least two different whole numbers"), ({"seeds": [1, 1]}, "at least two different"),
    ({"variants": ["dense:"]}, "at least two of different names"),
    ({"variants": ["dense", "b:"]}, "expected texts like 'local: "),
    ({"variants": ["a:", "b: --attention=spars"]}, "did you mean sparse?"),
    ({"variants": ["a:", "b: --windo=3"]}, "unknown key 'windo'"),
    ({"variants": ["a b:", "a-b:"]}, "of different names"),
    ({"evaluations": 0}, "evaluations >= 1"), ({"base": ["config/none.py"]}, "cannot read config file"),
])
def test_refused(text, tmp_path, refused, change, said):
    assert said in refused(compare, *settings(tmp_path / "out", text, **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted(ROOT.glob("config/compare_*.py")), ids=lambda file: file.stem)
def test_configs(file, text, tmp_path, monkeypatch):
    """Every config names variants that exist, also from another folder. Weights that runs begin with are made first."""
    monkeypatch.chdir(tmp_path)
    before = dict(vars(compare))
    try:
        compare.configure(vars(compare), [str(file)])
        for source in (argument.partition("--init_from=")[2] for argument in compare.base):
            if source:
                assert call(train, f"--dataset={text}", f"--out_dir={source}", *SMALL, "--max_iters=0") is None
        compare.check()
        assert len({tuple(variant.arguments)
                    for variant in map(compare.parse, compare.variants)}) == len(compare.variants)
    finally:
        vars(compare).update(before)
