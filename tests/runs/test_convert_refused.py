"""convert.py refuses what it cannot import with one sentence, and the other scripts say which files need it."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from plain_gpt import CHARACTERS, SHAPE, PlainGPT, hugging_face_weights, write_data, write_hugging_face, write_nanogpt
from test_forged_files import special, within

import convert
import sample
import train
from core import gpt2
from core.checkpoint import save
from helpers import Trap, call

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def assert_refused(refused, tmp_path):
    """A function of convert.py's arguments and of what the error says: nothing must be written."""

    def check(said, *arguments):
        with within(20):
            line = refused(convert, *arguments, f"--out_dir={tmp_path / 'out'}")
        assert said in line and "Traceback" not in line and len(line) < 700, line
        assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()

    return check


@pytest.fixture
def meta(tmp_path):
    return f"--meta={write_data(tmp_path / 'data') / 'meta.pkl'}"


# ---- nanoGPT -----------------------------------------------------------------------------------


def without(name):
    def change(saved):
        del saved["model"][name]
    return change


def entry(part, key, value):
    def change(saved):
        saved[part][key] = value
    return change


W = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize("change, said", [
    (entry("model", "transformer.h.0.moe.weight", torch.ones(2)), "GPT-2 has no weight transformer.h.0.moe.weight"),
    (entry("model", W, torch.ones(3, 16)), "layers.0.attention.qkv.weight"),
    (entry("model", W, 3), "expected a tensor, got 3"),
    (entry("model", W, torch.full((48, 16), torch.nan)), "not finite"),
    (entry("model", W, torch.ones(48, 16, dtype=torch.int8)), "int8"),
    (without(W), "layers.0.attention.qkv.weight"), (without("transformer.wte.weight"), "it lacks the token embedding"),
    (entry("model_args", "n_layer", 3), "layers.2"), (entry("model_args", "n_layer", "2"), "n_layer"),
    (entry("model_args", "n_head", 3), "n_embd must be a multiple of 3"),
    (entry("model_args", "block_size", 10**9), "positions.weight"),
    (entry("model_args", "n_embd", 10**6), "embedding.weight"), (entry("model_args", "dropout", 1.0), "dropout"),
    (lambda saved: saved.pop("model_args"), "model_args"), (lambda saved: saved.update(iter_num="x"), "iter_num"),
    (lambda saved: saved.update(model=[1]), "it['model']: expected an object"),
    (lambda saved: saved.update(best_val_loss=[1]), "no checkpoint of nanoGPT"),
], ids=range(17))
def test_checkpoints(tmp_path, meta, assert_refused, change, said):
    source = write_nanogpt(tmp_path / "nano", PlainGPT(**SHAPE))
    saved = torch.load(source / "ckpt.pt", weights_only=True)
    change(saved)
    torch.save(saved, source / "ckpt.pt")
    assert_refused(said, source, meta)


def test_checkpoints_that_are_none(tmp_path, meta, assert_refused):
    source = write_nanogpt(tmp_path / "nano", PlainGPT(**SHAPE))
    path = source / "ckpt.pt"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-50], whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        path.write_bytes(content)
        assert_refused("is damaged or no checkpoint of nanoGPT", source, meta)
    torch.save([1], path)
    assert_refused("expected an object", source, meta)
    torch.save({"model": Trap(tmp_path / "run")}, path)
    assert_refused("asks for code (", source, meta)
    assert_refused("asks for code (", path, meta)
    packed = io.BytesIO()
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part.filename))
    path.write_bytes(packed.getvalue())
    assert_refused("packed", source, meta)
    special(tmp_path / "pipe.pt", "fifo")
    assert_refused("expected a regular file, got a pipe", tmp_path / "pipe.pt", meta)


def test_its_characters(tmp_path, assert_refused, refused):
    source = write_nanogpt(tmp_path / "nano", PlainGPT(**SHAPE))
    assert_refused("vocabulary has 34 tokens, GPT-2's 50,257: give the characters", source)
    short = write_data(tmp_path / "short", CHARACTERS[:-1])
    assert_refused("holds 33 characters, expected 34", source, f"--meta={short / 'meta.pkl'}")
    assert_refused("No such file", source, f"--meta={tmp_path / 'none.pkl'}")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_asks_for_code(tmp_path, assert_refused, protocol):
    data = write_data(tmp_path / "data")
    for value in (Trap(tmp_path / "run"), {"itos": {0: "a", 1: Trap(tmp_path / "run")}}):
        (data / "meta.pkl").write_bytes(pickle.dumps(value, protocol))
        assert_refused("asks for more than dicts, texts and integers", data)


@pytest.mark.parametrize("content", [
    b"", b"text", b"\x80\x04", pickle.dumps({"itos": {0: "a", 1: "b"}})[:-2], pickle.dumps({"itos": {0: "a", 2: "b"}}),
    pickle.dumps({"itos": {0: "a", 1: "a"}}), pickle.dumps({"itos": {0: "ab", 1: "a"}}),
    pickle.dumps({"itos": {0: 3, 1: "a"}}),
    pickle.dumps({"stoi": {}}), pickle.dumps({"itos": {}}), pickle.dumps(3), pickle.dumps({"itos": {0: "\ud800"}}),
    b"\x80\x02}r\xff\xff\xff\x7f.",  # an entry of the memo for which there is no memory
    b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.", b"\x80\x04\x8a\x02a.", b"cos\nsystem\n(S'true'\ntR.",
    b"(((((((((t.",
], ids=range(17))
def test_forged_characters(tmp_path, assert_refused, content):
    data = write_data(tmp_path / "data")
    (data / "meta.pkl").write_bytes(content)
    assert_refused("meta.pkl", data)


def test_data(tmp_path, assert_refused, refused):
    data = write_data(tmp_path / "data")
    for content in (b"", b"ab", b"abc", b"abcde"):
        (data / "val.bin").write_bytes(content)
        assert_refused(f"val.bin: expected two tokens or more, of two bytes each, found {len(content)} bytes", data)
    (data / "val.bin").write_bytes(struct.pack("<3H", 1, 34, 2))
    assert_refused("val.bin holds the token 34, expected ids below 34", data)
    os.remove(data / "val.bin")
    assert_refused("val.bin: expected two tokens or more", data)


# ---- safetensors -------------------------------------------------------------------------------


@pytest.fixture
def weights():
    return hugging_face_weights(PlainGPT(**SHAPE, bias=True))


@pytest.mark.parametrize("changes, said", [
    ({"model_type": "llama"}, "expected the model_type gpt2, got 'llama'"), ({"model_type": None}, "model_type"),
    ({"activation_function": "relu"}, "activation_function"), ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by"), ({"n_inner": 32}, "n_inner: expected 64, got 32"),
    ({"n_layer": "2"}, "n_layer"), ({"n_layer": None}, "n_layer"), ({"n_layer": 3}, "layers.2"),
    ({"n_embd": 32}, "embedding.weight"),
    ({"n_positions": 13}, "positions.weight"), ({"vocab_size": 35}, "embedding.weight"),
    ({"resid_pdrop": 2}, "resid_pdrop"),
], ids=lambda value: str(value)[:30])
def test_config_of_hugging_face(tmp_path, weights, meta, monkeypatch, assert_refused, changes, said):
    vocabulary = changes.get("vocab_size", len(CHARACTERS))
    monkeypatch.setattr(gpt2, "VOCABULARY", vocabulary)
    assert_refused(said, write_hugging_face(tmp_path / "hf", weights, **changes))


@pytest.fixture
def source(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(gpt2, "VOCABULARY", len(CHARACTERS))
    return write_hugging_face(tmp_path / "hf", weights)


def test_weights_that_are_unknown_or_do_not_fit(tmp_path, weights, source, assert_refused):
    for change, said in (({"h.0.crossattention.c_attn.weight": torch.ones(2)},
                          "no weight h.0.crossattention.c_attn.weight"),
                         ({"model.layers.0.weight": torch.ones(2)}, "no weight model.layers.0.weight"),
                         ({"h.0.attn.c_attn.weight": torch.ones(48, 16)}, "layers.0.attention.qkv.weight"),
                         ({"h.0.attn.c_attn.weight": torch.ones(3)}, "layers.0.attention.qkv.weight"),
                         ({"wte.weight": torch.ones(34, 16, dtype=torch.int8)}, "int8"),
                         ({"lm_head.weight": torch.ones(34, 8).half()}, "head.weight"),
                         ({"wte.weight": torch.tensor(1.0)}, "embedding.weight")):
        assert_refused(said, write_hugging_face(source, {**weights, **change}))
    del weights["h.1.mlp.c_proj.bias"]
    assert_refused("layers.1.down.bias", write_hugging_face(source, weights))


def header(entries, size=0):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize("content", [
    b"", b"text", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", header({"wte.weight": 3}),
    header({"wte.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}),
    header({"wte.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, 16),
    header({"wte.weight": {"dtype": "X9", "shape": [2, 2], "data_offsets": [0, 16]}}, 16), header({}),
    header({"wte.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], "code": "x"}}, 17),
], ids=range(10))
def test_forged_headers(source, assert_refused, content):
    (source / "model.safetensors").write_bytes(content)
    assert_refused("hf", source)


def test_files_that_are_missing_or_elsewhere(tmp_path, source, weights, assert_refused):
    file = source / "model.safetensors"
    for text, said in (("{", "config.json is not what Hugging Face or --to writes"), ("[]", "expected an object")):
        (source / "config.json").write_text(text)
        assert_refused(said, file)
    os.remove(source / "config.json")
    assert_refused("config.json is missing: expected it beside model.safetensors", file)
    write_hugging_face(source, weights)
    for name in ("../x.safetensors", "/x.safetensors"):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
        assert_refused("expected files of its own folder", source)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "none.safetensors"}}))
    assert_refused("none.safetensors", source)
    os.remove(source / "model.safetensors.index.json")
    os.rename(file, source / "a.safetensors")
    (source / "b.safetensors").write_bytes(b"")
    assert_refused("holds 2 safetensors files, none of them model.safetensors", source)


@pytest.mark.parametrize("key, value", [
    ("model_config", [1]), ("model_config", {}), ("model_config", {"n_layer": 2}), ("meta", {}), ("meta", [1]),
    ("state", {"step": "x"}), ("state", {"best": None}), ("state", None),
    ("meta", {"tokenizer": "chars", "vocab_size": 3, "mark": None, "vocab": ["a"]})])
def test_forged_exports(tmp_path, assert_refused, key, value):
    from test_convert import write_run

    call(convert, write_run(tmp_path / "small")[0], f"--to={tmp_path / 'exported' / 'x.safetensors'}")
    path = tmp_path / "exported" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert_refused("exported", tmp_path / "exported")


@pytest.mark.parametrize("changes", [{"state": [1]}, {"state": {"step": "x"}}, {"meta": None}, {"note": 3}],
                         ids=range(4))
def test_forged_runs_are_not_exported(tmp_path, refused, changes):
    from test_convert import write_run

    run, to = write_run(tmp_path / "small")[0], tmp_path / "exported" / "x.safetensors"
    saved = torch.load(run / "best.pt", weights_only=True)
    if "note" in changes:
        changes = {"meta": {**saved["meta"], "note": torch.ones(2)}}
    save(run / "best.pt", {**saved, **changes})
    assert "best.pt is damaged or not a checkpoint of train.py" in refused(convert, run, f"--to={to}")
    assert not to.parent.exists()


def test_foreign_weights_beside_an_export(tmp_path, assert_refused, weights):
    from safetensors.torch import save_file
    from test_convert import write_run

    file = tmp_path / "exported" / "x.safetensors"
    call(convert, write_run(tmp_path / "small")[0], f"--to={file}")
    save_file({name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}, file)
    assert_refused("only the file has h.0.attn.c_attn.bias", file)


def test_without_safetensors(tmp_path, source, refused, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "safetensors is not installed" in refused(convert, source, f"--out_dir={tmp_path / 'out'}")


# ---- arguments ---------------------------------------------------------------------------------


def test_arguments(tmp_path, meta, refused):
    nano, data, out = write_nanogpt(tmp_path / "nano", PlainGPT(**SHAPE)), tmp_path / "data", tmp_path / "out"
    usage = "expected python convert.py SOURCE --out_dir=OUT, or python convert.py RUN --to=FILE.safetensors"
    for line in ((), (nano,), (nano, data, "--out_dir=x"), (nano, "--out_dir=x", "--to=y"), ("--out_dir=x",)):
        assert usage in refused(convert, *line)
    assert "there is no such file or folder" in refused(convert, tmp_path / "none", f"--out_dir={out}")
    (tmp_path / "empty").mkdir()
    assert "expected nanoGPT's ckpt.pt" in refused(convert, tmp_path / "empty", f"--out_dir={out}")
    (tmp_path / "text.txt").write_text("text")
    assert "is damaged or no checkpoint of nanoGPT" in refused(convert, tmp_path / "text.txt", f"--out_dir={out}")
    assert "ends in .safetensors, got 'x.pt'" in refused(convert, nano, "--to=x.pt")
    assert not out.exists()
    for source in (nano, nano / "ckpt.pt"):
        assert "out_dir is the folder of SOURCE" in refused(convert, source, f"--out_dir={nano}", meta)
    assert "is a checkpoint of nanoGPT" in refused(convert, nano, f"--to={out / 'x.safetensors'}")
    call(convert, nano, f"--out_dir={out}", meta)
    for source in (out, out / "best.pt"):
        assert "already" in refused(convert, source, f"--out_dir={tmp_path / 'more'}")
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "holds 'thesis.txt', which is no file of a run" in refused(convert, nano, f"--out_dir={out}", meta)
    assert "holds 'thesis.txt' and no meta.json" in refused(convert, data, f"--out_dir={out}")


# ---- other scripts -----------------------------------------------------------------------------


def test_nanogpt_given_to_other_scripts(tmp_path, meta, refused):
    nano = write_nanogpt(tmp_path / "nano", PlainGPT(**SHAPE))
    command = f"python convert.py {nano / 'ckpt.pt'} --out_dir=NEW_FOLDER"
    said = refused(sample, f"--out_dir={nano}")
    assert f"ckpt.pt is a checkpoint of nanoGPT; make a run of it first: {command}" in said
    data = tmp_path / "data"
    said = f"{data} is a data folder of nanoGPT; prepare it first: python convert.py {data} --out_dir=NEW_FOLDER"
    assert said in refused(train, f"--dataset={data}", f"--out_dir={tmp_path / 'out'}")
    os.remove(data / "meta.pkl")
    assert said in refused(train, f"--dataset={data}", f"--out_dir={tmp_path / 'out'}")
    call(convert, write_data(data), f"--out_dir={tmp_path / 'prepared'}")
    resume = (f"--dataset={tmp_path / 'prepared'}", f"--out_dir={nano}", "--init_from=resume")
    assert "ckpt.pt is a checkpoint of nanoGPT" in refused(train, *resume)


@pytest.mark.parametrize("key", ["always_save_checkpoint", "backend"])
def test_a_config_of_nanogpt(tmp_path, refused, key):
    config = tmp_path / "train_shakespeare_char.py"
    config.write_text(f"out_dir = 'out-shakespeare-char'\n{key} = False\ndataset = 'shakespeare_char'\n")
    for line in ([config], [f"--{key}=False"]):
        said = refused(train, *line)
        assert f"unknown key '{key}'; it is a setting of nanoGPT: remove it" in said
        assert "python convert.py SOURCE" in said


def test_safetensors_given_to_sample(source, refused):
    said = refused(sample, f"--out_dir={source}")
    assert f"holds weights of another program; make a run of them first: python convert.py {source}" in said
