"""convert.py: weights and data of nanoGPT, GPT-2 of Hugging Face, exports; against a GPT-2 that is written plainly."""

import json
import struct
from dataclasses import asdict

import pytest
import torch
from plain_gpt import (CHARACTERS, SHAPE, PlainGPT, hugging_face_weights, new_optimizer, step, write_data,
                       write_hugging_face, write_nanogpt)

import convert
import plot
import sample
import train
from core import gpt2, runs
from core.checkpoint import save
from core.dataset import Dataset
from core.optimizers import restore_optimizer
from helpers import call
from model import GPTConfig, load, new_model
from training_runs import assert_same

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def small_gpt2(monkeypatch):
    """GPT-2's vocabulary is that of PlainGPT; with three rows more where nanoGPT pads."""
    monkeypatch.setattr(gpt2, "VOCABULARY", len(CHARACTERS))
    monkeypatch.setattr(gpt2, "ROWS", len(CHARACTERS) + 3)


@torch.no_grad()
def assert_same_logits(out, net, vocab_size=SHAPE["vocab_size"]):
    model, idx = load(out / "best.pt")[0], torch.randint(vocab_size, (3, 12))
    torch.testing.assert_close(model(idx, idx)[0], net(idx)[..., :vocab_size], rtol=0, atol=1e-5)


# ---- nanoGPT -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt(tmp_path, data, bias, prefix, capsys):
    net, out = PlainGPT(**SHAPE, bias=bias), tmp_path / "out"
    source = write_nanogpt(tmp_path / "nano", net, prefix=prefix)
    assert not call(convert, source, f"--out_dir={out}", f"--meta={data / 'meta.pkl'}")
    assert "step 7, validation loss 2.5000, 2 layers of 16" in capsys.readouterr().out
    assert_same_logits(out, net)
    assert json.loads((out / "log.jsonl").read_text()) == {"step": 7, "split": "val", "loss": 2.5}
    config = json.loads((out / "config.json").read_text())
    assert config["source"]["file"] == "ckpt.pt" and len(config["source"]["sha256"]) == 64
    assert config["settings"]["n_embd"] == 16 and config["settings"]["learning_rate"] == 1e-3
    assert not (out / "ckpt.pt").exists()  # there is no state of an optimiser


def test_its_greedy_text(tmp_path, data, capsys):
    """As the plain loop draws it; up to the block size, where nanoGPT and sample.py go on differently."""
    net, out = PlainGPT(**SHAPE), tmp_path / "out"
    call(convert, write_nanogpt(tmp_path / "nano", net), f"--out_dir={out}", f"--meta={data / 'meta.pkl'}")
    idx = torch.tensor([[CHARACTERS.index(c) for c in "to be"]])
    for _ in range(7):
        idx = torch.cat([idx, net(idx)[:, -1:].argmax(-1)], 1)
    capsys.readouterr()
    call(sample, f"--out_dir={out}", "--start=to be", "--max_new_tokens=7", "--num_samples=1", "--temperature=0",
         "--device=cpu", "--dtype=float32")
    assert capsys.readouterr().out.startswith("".join(CHARACTERS[i] for i in idx[0]) + "\n---")


def test_rows_without_a_token_are_left_out(tmp_path, small_gpt2):
    shape = {**SHAPE, "vocab_size": gpt2.ROWS}
    net, out = PlainGPT(**shape), tmp_path / "out"
    optimizer = new_optimizer(net)
    step(net, optimizer, torch.randint(gpt2.VOCABULARY, (2, 9)))
    call(convert, write_nanogpt(tmp_path / "nano", net, shape, optimizer=optimizer), f"--out_dir={out}")
    assert_same_logits(out, net)
    saved = load(out / "ckpt.pt")[1]
    assert saved["model"]["embedding.weight"].shape == (gpt2.VOCABULARY, 16)
    assert saved["optimizer"]["embedding.weight"]["exp_avg"].shape == (gpt2.VOCABULARY, 16)
    assert saved["meta"] == {"kind": "lm", "tokenizer": "gpt2", "vocab_size": gpt2.VOCABULARY, "mark": None}


@pytest.fixture
def trained(tmp_path, data):
    """(a PlainGPT after three steps, its optimiser, the run made of it)."""
    net, out = PlainGPT(**SHAPE), tmp_path / "out"
    optimizer = new_optimizer(net)
    for _ in range(3):
        step(net, optimizer, torch.randint(len(CHARACTERS), (2, 9)))
    source = write_nanogpt(tmp_path / "nano", net, optimizer=optimizer)
    assert not call(convert, source, f"--out_dir={out}", f"--meta={data / 'meta.pkl'}")
    return net, optimizer, out


def test_its_optimiser_goes_on(trained):
    """The next step changes the weights as it does there."""
    net, optimizer, out = trained
    model, saved = load(out / "ckpt.pt", dropout=0.0)
    ours = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    restore_optimizer(out / "ckpt.pt", saved, model, ours)
    idx = torch.randint(len(CHARACTERS), (2, 9))
    step(net, optimizer, idx)
    step(lambda x: model(x, x)[0], ours, idx)
    here, there = model.state_dict(), gpt2.rename(net.state_dict())
    for name, weight in there.items():
        torch.testing.assert_close(here[name], weight, rtol=0, atol=1e-5, msg=name)


def test_its_training_is_resumed(trained, tmp_path, data):
    out, prepared = trained[2], tmp_path / "prepared"
    call(convert, data, f"--out_dir={prepared}")
    line = (f"--out_dir={out}", f"--dataset={prepared}", "--device=cpu", "--dtype=float32", "--init_from=resume")
    assert not call(train, *line, "--max_iters=9", "--eval_interval=9", "--eval_iters=1", "--batch_size=2")
    assert load(out / "ckpt.pt")[1]["state"]["step"] == 9 and load(out / "ckpt.pt")[0].config.activation == "gelu"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "val"][:2] == [7, 9]


def test_a_run_of_other_data_is_evaluated(trained, tmp_path, data, capsys, refused):
    """An imported model has no data; whatever has its vocabulary will do, and nothing else."""
    net, _, out = trained
    prepared, more = tmp_path / "prepared", tmp_path / "more"
    call(convert, data, f"--out_dir={prepared}")
    call(convert, write_data(tmp_path / "other", [*CHARACTERS, "Z"]), f"--out_dir={more}")
    capsys.readouterr()
    line = (f"--out_dir={out}", "--eval_only=True", "--device=cpu", "--dtype=float32")
    assert not call(train, *line, f"--dataset={prepared}")
    idx = torch.arange(len(CHARACTERS))
    losses = [torch.nn.functional.cross_entropy(net(idx[None, n : n + 12])[0, : len(y)], y, reduction="sum")
              for n in range(0, len(idx) - 1, 12) if len(y := idx[n + 1 : n + 13])]
    assert f"val: loss {sum(losses).item() / (len(idx) - 1):.4f} nats" in capsys.readouterr().out
    assert "vocab_size: expected 34, found 35" in refused(train, *line, f"--dataset={more}")


def test_an_optimiser_of_other_weights_is_left_out(tmp_path, data, capsys):
    net = PlainGPT(**SHAPE)
    other = torch.optim.SGD(net.parameters(), momentum=0.9)
    step(net, other, torch.randint(len(CHARACTERS), (2, 9)))
    source = write_nanogpt(tmp_path / "nano", net, optimizer=other)
    assert not call(convert, source, f"--out_dir={tmp_path / 'out'}", f"--meta={data / 'meta.pkl'}")
    assert "cannot be resumed" in capsys.readouterr().out and not (tmp_path / "out" / "ckpt.pt").exists()


def test_data_of_nanogpt(tmp_path, data, capsys):
    out = tmp_path / "prepared"
    assert not call(convert, data, f"--out_dir={out}")
    prepared = Dataset(out)
    assert prepared.dtype == "uint8" and prepared.tokens("train")[:40].tolist() == [*range(34), *range(6)]
    assert prepared.count("val", "bytes") == 35 and prepared.count("train", "tokens") == 680  # é is two bytes
    assert prepared.tokenizer.decode(prepared.tokens("val")) == "".join(CHARACTERS)
    prepared.check_files()
    assert not call(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={out}", "--device=cpu", "--dtype=float32",
                    "--max_iters=1", "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=8", "--eval_iters=1")


def test_data_in_tokens_of_gpt2(tmp_path, data, monkeypatch):
    """Without meta.pkl; the last token is the document mark, and counts one byte."""
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\w+|\s", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    monkeypatch.setattr(gpt2, "VOCABULARY", 258)
    (data / "meta.pkl").unlink()
    (data / "val.bin").write_bytes(struct.pack("<4H", 256, 97, 257, 98))
    call(convert, data, f"--out_dir={tmp_path / 'out'}")
    prepared = Dataset(tmp_path / "out")
    assert prepared.meta["mark"] == 257 and prepared.dtype == "uint16" and prepared.count("val", "bytes") == 5
    (data / "val.bin").write_bytes(struct.pack("<2H", 256, 97))
    call(convert, data, f"--out_dir={tmp_path / 'again'}")
    assert Dataset(tmp_path / "again").meta["mark"] is None


# ---- Hugging Face ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "prefix", "shards", "head", "untied", "half", "gelu"])
def test_gpt2_of_hugging_face(tmp_path, small_gpt2, form):
    net = PlainGPT(**SHAPE, bias=True, approximate="none" if form == "gelu" else "tanh")
    if form == "half":
        net.half().float()
    if form == "untied":
        net.lm_head.weight = torch.nn.Parameter(torch.randn_like(net.lm_head.weight))
    weights = hugging_face_weights(net)
    if form == "prefix":
        weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    if form in ("head", "untied"):
        weights["lm_head.weight"] = net.lm_head.weight.detach().clone()
    if form == "half":
        weights = {name: tensor.half() for name, tensor in weights.items()}
    activation = {"activation_function": "gelu"} if form == "gelu" else {}
    source = write_hugging_face(tmp_path / "hf", weights, files=3 if form == "shards" else 1, **activation)
    assert not call(convert, source, f"--out_dir={tmp_path / 'out'}")
    assert_same_logits(tmp_path / "out", net)
    model, saved = load(tmp_path / "out" / "best.pt")
    assert saved["meta"]["mark"] == gpt2.VOCABULARY - 1 and model.config.tie == (form != "untied")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"best.pt", "config.json", "lock"}


def test_characters_of_a_hugging_face_model(tmp_path, data):
    source = write_hugging_face(tmp_path / "hf", hugging_face_weights(PlainGPT(**SHAPE, bias=True)))
    assert not call(convert, source, f"--out_dir={tmp_path / 'out'}", f"--meta={data / 'meta.pkl'}")
    assert sample.read_run(tmp_path / "out" / "best.pt")[1].decode([33]) == "é"


def test_it_cannot_be_resumed(tmp_path, small_gpt2, data, refused):
    source = write_hugging_face(tmp_path / "hf", hugging_face_weights(PlainGPT(**SHAPE, bias=True)))
    call(convert, source, f"--out_dir={tmp_path / 'out'}")
    call(convert, data, f"--out_dir={tmp_path / 'prepared'}")
    line = refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={tmp_path / 'prepared'}", "--init_from=resume")
    assert "best.pt beside it holds weights, but no state of a training" in line
    assert line.endswith(f"start from them with --init_from={tmp_path / 'out'}")


# ---- export ------------------------------------------------------------------------------------

META = {"tokenizer": "chars", "vocab_size": 34, "mark": None, "vocab": CHARACTERS, "kind": "lm", "lossless": True}
MODELS = {"default": {}, "untied": {"tie": False}, "learned": {"pos": "learned", "norm": "layernorm", "bias": True},
          "window": {"attention": "sparse", "options": {"window": 5}},
          "spans": {"attention": "adaptive_attention_span"},
          "tanh": {"activation": "gelu_tanh"}, "classifier": {"n_class": 2},
          "bilstm": {"model": "bilstm", "n_class": 2, "options": {"hidden": 8}}}


def write_run(folder, **changes):
    """The best.pt of a small random model."""
    torch.manual_seed(3)
    model = new_model(GPTConfig(**{**SHAPE, **changes}))
    meta = META | ({"kind": "classify", "classes": ["bad", "good"]} if model.config.n_class else {})
    folder.mkdir()
    save(folder / "best.pt", {"model": model.state_dict(), "model_config": asdict(model.config), "settings": {},
                              "meta": {**meta, "source": {"file": "x"}, "splits": {}},
                              "state": {"step": 5, "best": 1.5, "best_step": 4}})
    return folder, model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_imported(tmp_path, name):
    """Equal to the bit: weights, configuration, options, tokenizer. A tied weight is there once."""
    from safetensors.torch import load_file

    run, model = write_run(tmp_path / "run", **MODELS[name])
    file = tmp_path / "exported" / "model.safetensors"
    assert not call(convert, run, f"--to={file}")
    tied = model.config.tie and model.config.causal
    assert ("head.weight" in load_file(file)) == (not tied)
    for source, out in ((file, tmp_path / "a"), (file.parent, tmp_path / "b")):
        assert not call(convert, source, f"--out_dir={out}")
        again, saved = load(out / "best.pt")
        assert_same(dict(again.state_dict()), dict(model.state_dict()))
        assert again.config == model.config
        assert {key: value for key, value in saved["meta"].items() if key not in ("source", "splits")} == saved["meta"]
        assert sample.read_run(out / "best.pt")[2] == (["bad", "good"] if model.config.n_class else [])
        if model.config.n_class:  # whose best score is no loss
            assert not (out / "log.jsonl").exists()
        else:
            assert json.loads((out / "log.jsonl").read_text()) == {"step": 4, "split": "val", "loss": 1.5}


def test_an_export_overwrites_nothing(tmp_path, refused, monkeypatch):
    run, _ = write_run(tmp_path / "run")
    (tmp_path / "config.json").write_text("mine")
    said = refused(convert, run, f"--to={tmp_path / 'x.safetensors'}")
    assert "config.json exists already: give --to a new folder" in said
    assert (tmp_path / "config.json").read_text() == "mine" and not (tmp_path / "x.safetensors").exists()
    call(convert, run, f"--to={tmp_path / 'new' / 'x.safetensors'}")
    assert "x.safetensors exists already" in refused(convert, run, f"--to={tmp_path / 'new' / 'x.safetensors'}")

    def full(path, write, keep=None):
        raise runs.save_error(path, "No space left on device")

    monkeypatch.setattr(convert.exchange, "write_whole", full)
    assert "No space left" in refused(convert, run, f"--to={tmp_path / 'full' / 'x.safetensors'}")
    assert not list((tmp_path / "full").iterdir())


def test_runs_of_old_versions_have_gelu(tmp_path):
    run, model = write_run(tmp_path / "run")
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    del checkpoint["model_config"]["activation"], checkpoint["sealed"]
    save(run / "best.pt", checkpoint)
    again, idx = load(run / "best.pt")[0], torch.randint(34, (1, 12))
    assert again.config.activation == "gelu" and torch.equal(again(idx, idx)[0], model(idx, idx)[0])


# ---- folders -----------------------------------------------------------------------------------


def test_an_earlier_run_is_moved_aside(tmp_path, data, capsys):
    out = tmp_path / "out"
    line = (f"--out_dir={out}", f"--meta={data / 'meta.pkl'}")
    for seed in (0, 1):
        call(convert, write_nanogpt(tmp_path / "nano", PlainGPT(**SHAPE, seed=seed)), *line)
    assert "the earlier run in out is now in out.1" in capsys.readouterr().out
    assert_same_logits(tmp_path / "out.1", PlainGPT(**SHAPE))
    assert_same_logits(out, PlainGPT(**SHAPE, seed=1))


def test_a_full_disk_leaves_no_half_of_a_run(trained, tmp_path, data, refused, monkeypatch):
    def full(path, text):
        raise runs.save_error(path, "No space left on device")

    monkeypatch.setattr(convert.exchange, "write_text", full)
    line = refused(convert, tmp_path / "nano", f"--out_dir={trained[2]}", f"--meta={data / 'meta.pkl'}")
    assert "No space left" in line and [path.name for path in trained[2].iterdir()] == ["lock"]
    assert load(tmp_path / "out.1" / "ckpt.pt")[1]["state"]["step"] == 7


def test_its_curve_is_drawn(trained):
    pytest.importorskip("matplotlib")
    call(plot, trained[2])
    assert (trained[2] / "curves.png").stat().st_size > 5000
