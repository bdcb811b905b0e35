"""Warm starts: a new run that begins with the weights of another one, given as --init_from=FOLDER_OR_FILE."""

import base64
import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from test_ranks import SHAPE as OF_RANKS
from test_ranks import assert_close
from test_ranks import fit as fit_ranks
from training_runs import SHAPE, assert_same, assert_same_runs, fit, log_of

import train
from core import checkpoint as checkpoint_file
from core import dist, hardware, prepare
from core.config import UserError
from core.mechanisms import new_model
from core.tokenizer import Tokenizer
from core.warm_start import WarmStart, describe, matching_tokens
from helpers import call
from model import GPTConfig

pytestmark = pytest.mark.usefixtures("quick")

TRAIN = ("--batch_size=4", "--warmup_iters=2", "--eval_interval=5", "--eval_iters=2", "--log_interval=1",
         "--device=cpu",
         "--dtype=float32")
WORDS = {"kind": "lm", "tokenizer": "words", "vocab_size": 4, "mark": 0, "vocab": ["<s>", "<unk>", "film", "good"]}
CHARS = {"kind": "lm", "tokenizer": "chars", "vocab_size": 6, "mark": None,
         "vocab": ["<unk>", "e", "t", "é", "\n", "a"]}


def warm(out, source, data, *arguments):
    """train.py's exit code; no sizes of the model are given."""
    return call(train, f"--out_dir={out}", f"--dataset={data}", f"--init_from={source}", *TRAIN, *arguments)


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def source_fixture(name, data, *arguments):
    """A module's fixture: the folder of a run of five steps."""

    @pytest.fixture(scope="module", name=name)
    def run(tmp_path_factory, request):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hardware, "matmul_rate", lambda device, dtype: 1e9)
            out = tmp_path_factory.mktemp(name) / name
            assert not fit(out, request.getfixturevalue(data), "--max_iters=5", "--learning_rate=0.05", *arguments)
        return out

    return run


dense = source_fixture("dense", "text")
spans = source_fixture("spans", "text", "--use_adaptive_attention=True", "--softness_span_mask=4", "--span_init=[5]")
learned = source_fixture("learned", "text", "--pos=learned", "--tie=False", "--norm=layernorm", "--bias=True",
                         "--dropout=0.1")
grams = source_fixture("grams", "text", "--ngram=3", "--ngram_rows=50", "--ngram_dim=4")
classifier = source_fixture("classifier", "reviews")


@pytest.fixture(scope="module")
def chars(tmp_path_factory):
    """A language model's data of six characters."""
    return write_tokens(tmp_path_factory.mktemp("data") / "chars", CHARS)


def write_tokens(folder, meta):
    """A folder of 400 random tokens of a vocabulary in each split."""
    tokens = np.random.default_rng(0).integers(meta["vocab_size"], size=400)
    meta = {"name": folder.name, "lossless": True, "partial": False, "options": {}, "source": {"file": "x"}, **meta,
            "split_rule": "as given"}
    prepare.write(folder, meta, {split: {"tokens": tokens, "bytes": 400} for split in ("train", "val", "test")})
    return folder


# ---- the same model ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings", [
    ("dense", {}), ("grams", {"ngram": 3, "ngram_rows": 50, "ngram_dim": 4}),
    ("spans", {"attention": "adaptive_attention_span", "softness_span_mask": 4, "span_init": [5]}),
    ("learned", {"pos": "learned", "tie": False, "norm": "layernorm", "bias": True, "dropout": 0.0})])
def test_the_first_loss_is_the_source_s(name, settings, request, text, tmp_path):
    source = request.getfixturevalue(name)
    assert not warm(tmp_path / "out", source, text, "--max_iters=0", "--eval_iters=0")
    best = next(record for record in log_of(source) if record.get("whole"))
    assert log_of(tmp_path / "out", "val")[0]["loss"] == pytest.approx(best["loss"], abs=1e-6)
    assert_same(weights_of(tmp_path / "out" / "best.pt"), weights_of(source / "best.pt"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"] | config["options"] | SHAPE | settings == config["settings"] | config["options"]
    digest = hashlib.sha256((source / "best.pt").read_bytes()).hexdigest()
    origin = {"path": str((source / "best.pt").resolve()), "sha256": digest, "step": best["step"]}
    assert config["warm_start"] == torch.load(tmp_path / "out" / "ckpt.pt")["warm_start"] == origin


def test_a_checkpoint_file_or_a_folder_without_best(dense, text, tmp_path, capsys):
    shutil.copytree(dense, tmp_path / "source")
    (tmp_path / "source" / "best.pt").unlink()
    for n, source in enumerate((tmp_path / "source", dense / "ckpt-previous.pt")):
        assert not warm(tmp_path / f"out{n}", source, text, "--max_iters=0")
    said = capsys.readouterr().out
    assert "source/ckpt.pt, step 5" in said and f"{dense}/ckpt-previous.pt, step 0" in said
    assert_same(weights_of(tmp_path / "out0" / "best.pt"), weights_of(dense / "ckpt.pt"))


def test_given_settings_win(dense, spans, text, tmp_path, capsys):
    """Also those that are given with train.py's default values, on the command line and in a config file."""
    (tmp_path / "x.py").write_text("dropout = 0.1\nn_layer = 4\n")

    def settings(source, *arguments):
        assert not warm(tmp_path / "out", source, text, "--max_iters=0", *arguments)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        return config["settings"] | config["options"]

    found = settings(dense, str(tmp_path / "x.py"), "--block_size=256", "--norm=rmsnorm")
    assert (found["n_layer"], found["block_size"], found["n_embd"], found["dropout"]) == (4, 256, 16, 0.1)
    assert "its settings: n_head=2, n_embd=16\n" in capsys.readouterr().out
    found = settings(spans, "--span_reg=0.5")
    assert (found["attention"], found["softness_span_mask"], found["span_reg"]) == ("adaptive_attention_span", 4, 0.5)
    said = capsys.readouterr().out
    assert ("its settings: block_size=16, n_layer=2, n_head=2, n_embd=16, attention=adaptive_attention_span, "
            "softness_span_mask=4, span_init=[5]\n") in said
    assert settings(spans, "--use_adaptive_attention=False")["attention"] == "dense"


def test_the_source_s_own_folder(dense, text, tmp_path, capsys):
    """The run that was there is moved aside, as ever."""
    out = shutil.copytree(dense, tmp_path / "out")
    assert not warm(out, out, text, "--max_iters=1", "--attention=sparse")
    assert "the earlier run in out is now in out.1" in capsys.readouterr().out
    assert (tmp_path / "out.1" / "best.pt").read_bytes() == (dense / "best.pt").read_bytes()


# ---- other models ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention, new", [("sparse", []), ("adaptive_attention_span", ["span"]), ("atrt", [])])
def test_another_attention(dense, text, tmp_path, capsys, attention, new):
    """The mask's parameters are those of a run from scratch with the same seed; all else is the source's."""
    assert not warm(tmp_path / "out", dense, text, "--max_iters=1", f"--attention={attention}")
    said = capsys.readouterr().out
    assert not fit(tmp_path / "scratch", text, "--max_iters=0", f"--attention={attention}")
    first, source = (weights_of(path) for path in (tmp_path / "out" / "ckpt-previous.pt", dense / "best.pt"))
    assert first.keys() - source.keys() == {f"layers.{n}.attention.{name}" for n in range(2) for name in new}
    assert_same({name: first[name] for name in source}, source)
    scratch = weights_of(tmp_path / "scratch" / "best.pt")
    assert all(torch.equal(first[name], scratch[name]) for name in first.keys() - source.keys())
    assert "taken: 10,240 parameters in embedding, layers" in said and "left: 0 parameters\n" in said
    assert ("new: 4 parameters in layers.0-1.attention.span\n" if new else "new: 0 parameters\n") in said


def test_a_mechanism_s_parameters(spans, text, tmp_path, capsys):
    """They are taken by the same mechanism alone."""
    assert not warm(tmp_path / "same", spans, text, "--max_iters=0", "--use_triangle_wave_masking=True")
    said, source = capsys.readouterr().out, weights_of(spans / "best.pt")
    same = weights_of(tmp_path / "same" / "best.pt")
    assert torch.equal(same["layers.1.attention.span"], source["layers.1.attention.span"])
    assert "new: 8 parameters in layers.0-1.attention.period, layers.0-1.attention.ratio\n" in said
    assert not warm(tmp_path / "other", spans, text, "--max_iters=0", "--attention=sparse")
    assert "left: 4 parameters in layers.0-1.attention.span\n" in capsys.readouterr().out

    config = GPTConfig(**SHAPE, attention="adaptive_attention_span", options={"span_init": [5]})
    model, start = new_model(config), WarmStart(GPTConfig)
    start.config, start.weights, start.meta = GPTConfig(**SHAPE, attention="strange"), source, {}
    for name, count in (("layers.0.attention.span", 0), ("layers.0.attention.qkv.weight", 48 * 16)):
        assert start.copy(name, model.state_dict()[name], config, {}, None) == count
    fewer = torch.zeros(24, 16)  # keys than queries
    assert start.copy("layers.0.attention.qkv.weight", fewer, config, {}, None) == 0
    padded = torch.zeros(300, 16)  # of a model that was edited to have more rows than tokens
    assert start.copy("embedding.weight", padded, config, {"vocab_size": 256}, None) == 256 * 16
    assert torch.equal(padded[:256], source["embedding.weight"]) and not padded[256:].any()
    start.path, start.weights = "x", {"wte.weight": torch.zeros(256, 16)}
    with pytest.raises(UserError, match="no weight in x belongs to a model like this one"):
        start.copy_into(model, {})


@pytest.mark.parametrize("n_layer", [1, 3])
def test_other_numbers_of_layers(dense, text, tmp_path, capsys, n_layer):
    assert not warm(tmp_path / "out", dense, text, "--max_iters=0", f"--n_layer={n_layer}")
    found, source = weights_of(tmp_path / "out" / "best.pt"), weights_of(dense / "best.pt")
    both = found.keys() & source.keys()
    assert_same({name: found[name] for name in both}, {name: source[name] for name in both})
    assert ("layers.1.up.weight" in both) == (n_layer == 3) and "layers.0.up.weight" in both
    said = capsys.readouterr().out
    assert ("left: 3,072 parameters in layers.1\n" if n_layer == 1 else "new: 3,072 parameters in layers.2\n") in said


@pytest.mark.parametrize("block_size", [8, 24])
def test_other_block_sizes(learned, text, tmp_path, capsys, block_size):
    assert not warm(tmp_path / "out", learned, text, "--max_iters=0", f"--block_size={block_size}")
    found, source = (weights_of(path / "best.pt")["positions.weight"] for path in (tmp_path / "out", learned))
    rows = min(block_size, 16)
    assert len(found) == block_size and torch.equal(found[:rows], source[:rows])
    said = capsys.readouterr().out
    assert ("left: 128 parameters in 8 of 16 rows of positions\n" if block_size == 8 else
            "new: 128 parameters in 8 of 24 rows of positions\n") in said


def test_a_head_that_is_tied_now(learned, text, tmp_path, capsys):
    assert not warm(tmp_path / "out", learned, text, "--max_iters=0", "--tie=True")
    found, source = weights_of(tmp_path / "out" / "best.pt"), weights_of(learned / "best.pt")
    assert torch.equal(found["embedding.weight"], source["embedding.weight"])
    assert torch.equal(found["head.weight"], source["embedding.weight"]) and not torch.equal(*(
        source[f"{name}.weight"] for name in ("embedding", "head")))
    assert "new: 0 parameters\n  left: 4,096 parameters in head\n" in capsys.readouterr().out


def test_a_language_model_becomes_a_classifier(dense, reviews, tmp_path, capsys):
    """Byte 0 is a byte for the one and the document mark for the other."""
    assert not warm(tmp_path / "out", dense, reviews, "--max_iters=1")
    first, source = weights_of(tmp_path / "out" / "ckpt-previous.pt"), weights_of(dense / "best.pt")
    assert first["head.weight"].shape == (2, 16) and not first["head.bias"].any()
    assert torch.equal(first["embedding.weight"][1:], source["embedding.weight"][1:])
    assert not torch.equal(first["embedding.weight"][0], source["embedding.weight"][0])
    assert torch.equal(first["layers.1.down.weight"], source["layers.1.down.weight"])
    said = capsys.readouterr().out
    assert "taken: 10,224 parameters in 255 of 256 rows of embedding, layers\n" in said
    assert "new: 50 parameters in 1 of 256 rows of embedding, head\n" in said


def test_a_classifier_s_head(classifier, reviews, tmp_path, capsys):
    """It is taken for the same classes, and left by a language model."""
    assert not warm(tmp_path / "same", classifier, reviews, "--max_iters=0")
    assert_same(weights_of(tmp_path / "same" / "best.pt"), weights_of(classifier / "best.pt"))
    capsys.readouterr()
    other = shutil.copytree(reviews, tmp_path / "other classes")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"classes": ["ham", "spam"]}))
    assert not warm(tmp_path / "other", classifier, other, "--max_iters=0")
    assert "new: 34 parameters in head\n  left: 34 parameters in head\n" in capsys.readouterr().out
    assert not warm(tmp_path / "text", classifier, reviews, "--max_iters=0", "--task=lm")
    assert "new: 0 parameters\n  left: 34 parameters in head\n" in capsys.readouterr().out


def test_an_lstm(reviews, tmp_path, capsys):
    lstm = ("--model=bilstm", "--attention=additive", "--hidden=8", "--max_iters=0")
    assert not fit(tmp_path / "source", reviews, *lstm)
    assert not warm(tmp_path / "out", tmp_path / "source", reviews, "--attention=multihead", "--max_iters=0")
    found, source = (weights_of(tmp_path / name / "best.pt") for name in ("out", "source"))
    assert torch.equal(found["onward.1.weight_hh_l0"], source["onward.1.weight_hh_l0"])
    said = capsys.readouterr().out
    assert "new: 1,024 parameters in attention\n  left: 288 parameters in context, inner\n" in said, said


# ---- other vocabularies ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "learned", "grams"])
def test_bytes_become_chars(name, request, chars, tmp_path, capsys):
    """Rows of embedding and head (tied or not) are taken for the characters of one byte; the others are new."""
    source = request.getfixturevalue(name)
    assert not warm(tmp_path / "out", source, chars, "--max_iters=0")
    found, source = weights_of(tmp_path / "out" / "best.pt"), weights_of(source / "best.pt")
    for matrix in ("embedding.weight", "head.weight"):
        assert len(found[matrix]) == 6
        for i, character in enumerate(CHARS["vocab"]):
            same = [n for n in range(256) if torch.equal(found[matrix][i], source[matrix][n])]
            assert same == ([] if character in ("<unk>", "é") else [ord(character)])
    said = capsys.readouterr().out
    assert "4 of 6 rows of embedding" in said
    if name == "grams":  # the rows of n-grams of bytes are not those of characters
        assert "new: " in said and "ngrams.tables" in said[said.index("  new: ") : said.index("  left: ")]
        assert torch.equal(found["ngrams.proj.weight"], source["ngrams.proj.weight"])
        assert not torch.isclose(found["ngrams.tables.0.weight"], source["ngrams.tables.0.weight"]).any()


def test_matching_tokens():
    numbered = {"kind": "lm", "tokenizer": "bytes", "vocab_size": 256, "mark": 0}
    pattern = r"\s?\w+|\W"
    pairs = ["film", " good"]
    ranks = [base64.b64encode(token).decode() for token in [*(bytes([b]) for b in range(256)), *map(str.encode, pairs)]]
    bpe = {"kind": "lm", "tokenizer": "bpe", "vocab_size": 259, "mark": 258, "pattern": pattern, "ranks": ranks}
    assert matching_tokens("x", CHARS, dict(CHARS, source={})) is None
    assert matching_tokens("x", CHARS, numbered) == ([10, 97, 101, 116], [4, 5, 1, 2])
    assert matching_tokens("x", WORDS, bpe) == ([257, 258], [3, 0])  # " good" and the mark, not "film"
    assert matching_tokens("x", {**WORDS, "mark": None}, bpe) == ([257], [3])
    assert matching_tokens("x", CHARS, {**CHARS, "vocab": ["a", "é", "<unk>", "x", "y", "z"]}) == ([0, 1, 2], [5, 3, 0])
    with pytest.raises(UserError, match="x has 4 words as tokens, and none of them is among the 256 bytes of the data"):
        matching_tokens("x", WORDS, numbered)  # though both have a mark
    assert Tokenizer(WORDS).token_keys() == ["mark", "unknown", b" film", b" good"]


# ---- what is refused ---------------------------------------------------------------------------


def test_refused(dense, text, tmp_path, refused):
    """With a reason, before anything is written."""
    bare = write_tokens(tmp_path / "words", WORDS)
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(dense, tmp_path / "damaged")
    blob = (damaged / "best.pt").read_bytes()
    (damaged / "best.pt").write_bytes(blob[:2000] + bytes([blob[2000] ^ 1]) + blob[2001:])
    torch.save({"wte.weight": torch.zeros(2, 2)}, tmp_path / "foreign.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    known = torch.load(dense / "best.pt")
    checkpoint_file.save(tmp_path / "anonymous.pt", {key: value for key, value in known.items() if key != "meta"})
    broken = {**known["model"], "layers.0.up.weight": torch.full((64, 16), float("nan"))}
    checkpoint_file.save(tmp_path / "nan.pt", {**known, "model": broken})
    wide = {**known["model"], "layers.0.up.weight": torch.zeros(65, 16)}
    checkpoint_file.save(tmp_path / "wide.pt", {**known, "model": wide})
    for source, data, argument, said in (
            (dense, text, "--n_embd=32",
             "has n_embd=16, and n_embd=32 is given: its weights do not fit; leave n_embd out"),
            (dense, text, "--n_head=4", "has n_head=2, and n_head=4 is given"),
            (dense, bare, "--seed=1", "has 256 bytes as tokens, and none of them is among the 4 words of the data"),
            (damaged, text, "--seed=1", "is damaged or not a checkpoint of train.py (it is not what was written"),
            (tmp_path / "empty", text, "--seed=1", "no checkpoint at"),
            (tmp_path / "none", text, "--seed=1", "no file or folder has this name"),
            (tmp_path / "foreign.pt", text, "--seed=1", "not a checkpoint of train.py"),
            (tmp_path / "tensor.pt", text, "--seed=1", "not a checkpoint of train.py"),
            (tmp_path / "anonymous.pt", text, "--seed=1", "meta"),
            (tmp_path / "nan.pt", text, "--seed=1", "layers.0.up.weight holds numbers that are not finite"),
            (tmp_path / "wide.pt", text, "--seed=1", "layers.0.up.weight has the shape (65, 16) in"),
            (text / "train.bin", text, "--seed=1", "not a checkpoint of train.py")):
        line = refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={data}", f"--init_from={source}", *TRAIN,
                       argument)
        assert said in line, line
        assert not (tmp_path / "out").exists()


# ---- the runs that follow ----------------------------------------------------------------------


def test_resumed_equals_unbroken(dense, text, tmp_path):
    """Without the source; and the origin stays in config.json and the checkpoints."""
    steps = ("--lr_decay_iters=8", "--dropout=0.2", "--use_adaptive_attention=True")
    source = shutil.copytree(dense, tmp_path / "source")
    assert not warm(tmp_path / "whole", source, text, *steps, "--max_iters=8")
    assert not warm(tmp_path / "cut", source, text, *steps, "--max_iters=5")
    shutil.rmtree(source)
    assert not fit(tmp_path / "cut", text, *steps, "--max_iters=8", "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    origins = [json.loads((tmp_path / name / "config.json").read_text())["warm_start"] for name in ("whole", "cut")]
    assert origins[0] == origins[1] and re.fullmatch("[0-9a-f]{64}", origins[0]["sha256"])


def test_a_restart_by_torchrun_goes_on(dense, text, tmp_path, monkeypatch, capsys):
    assert not warm(tmp_path / "out", dense, text, "--max_iters=3")
    monkeypatch.setattr(dist, "restarted", lambda folder: True)
    assert not warm(tmp_path / "out", dense, text, "--max_iters=4")
    said = capsys.readouterr().out
    assert "resume: from step 3 of 4" in said and not (tmp_path / "out.1").exists()
    assert not warm(tmp_path / "new", dense, text, "--max_iters=1")  # restarted before its first checkpoint
    assert "taken: 10,240 parameters" in capsys.readouterr().out


def test_from_scratch_holds_no_origin(dense):
    assert "warm_start" not in json.loads((dense / "config.json").read_text()) | torch.load(dense / "ckpt.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_two_ranks_are_one(text, tmp_path):
    """From a sharded checkpoint, to one rank, two, and a sharded model on two."""
    fit_ranks(2, tmp_path / "source", text, "--shard=True", "--max_iters=2")
    arguments = (f"--init_from={tmp_path / 'source'}", "--use_adaptive_attention=True", "--n_layer=3", "--max_iters=2")
    assert not call(train, f"--out_dir={tmp_path / 'one'}", f"--dataset={text}", *OF_RANKS, *arguments)
    for shard in (False, True):
        said = fit_ranks(2, tmp_path / f"two-{shard}", text, *arguments, f"--shard={shard}")
        assert "new: 3,078 parameters in layers.0-1.attention.span, layers.2\n" in said[0]
        assert_close(tmp_path / "one", tmp_path / f"two-{shard}")


def test_describe():
    weights = {f"layers.{n}.{part}.weight": torch.zeros(3, 2) for n in range(12) for part in ("up", "down")}
    weights |= {"embedding.weight": torch.zeros(5, 2), "scale": torch.zeros(())}
    counts = {f"layers.{n}.up.weight": 6 for n in (0, 1, 2, 5, 10, 11)} | {"embedding.weight": 4, "scale": 1}
    assert describe(counts, weights) == ["2 of 5 rows of embedding", "layers.0-2, 5, 10-11.up", "scale"]
    assert describe({name: weight.numel()
                     for name, weight in weights.items()}, weights) == ["layers", "embedding", "scale"]
