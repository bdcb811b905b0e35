"""Checkpoints that are damaged, foreign or of other circumstances, and numbers that are not finite."""

import os
import pickle
import random
import re

import pytest
import torch
from fault_injection import count, end, program, several
from fault_runs import MAX, assert_nothing_lost, begin, content, fit, half_done, log_of, unlike

from core.checkpoint import PREVIOUS, check_whole, save
from core.config import UserError
from helpers import Trap
from model import load

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")


# ---- checkpoints -------------------------------------------------------------------------------


def assert_refused(path, said):
    with pytest.raises(UserError, match=said) as error:
        load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_cut_and_flipped_checkpoints(whole, text, tmp_path):
    out, draw = half_done(whole, text, tmp_path / "out"), random.Random(4)
    path = out / "ckpt.pt"
    good = path.read_bytes()
    said = f"ckpt.pt is damaged .*: rename {PREVIOUS} to ckpt.pt to go on from there"
    lengths = [0, 1, len(good) - 1, len(good) - 64, len(good) - 72, len(good) - 73]
    for length in lengths + draw.choices(range(len(good)), k=several(10, 300)):
        path.write_bytes(good[:length])
        assert_refused(path, said)
        count("checkpoint cut at any length", refused=1)
    for _ in range(several(20, 500)):
        place, mask = draw.randrange(len(good)), draw.randrange(1, 256)
        path.write_bytes(good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :])
        assert_refused(path, said)
        count("a byte of a checkpoint flipped", refused=1)
    code, words = fit(out, text)
    assert code == 2 and re.search(said, words)
    os.replace(out / PREVIOUS, path)  # as it says
    assert_nothing_lost("a byte of a checkpoint flipped", whole, out, text)


def test_what_is_offered(whole, text, tmp_path):
    out = half_done(whole, text, tmp_path / "out")
    for name in ("best.pt", "ckpt.pt", PREVIOUS):
        (out / name).write_bytes((out / name).read_bytes()[:-100])
        if name == "best.pt":
            assert_refused(out / name, f"whole beside it: ckpt.pt and {PREVIOUS}")
            code, said = fit(out, text)
            assert code == 2 and "best.pt is damaged" in said and "take it away to go on without it" in said
    assert_refused(out / "ckpt.pt", "no other beside it is whole: train again")


def test_without_best(whole, text, tmp_path):
    """best.pt taken away: the best is counted from there on, which is said, and the weights of the run are not
    touched."""
    out = half_done(whole, text, tmp_path / "out")
    (out / "best.pt").unlink()
    code, said = end(begin(out, text))
    assert code == 0 and "best.pt is missing: the best weights are counted from here on" in said
    assert unlike(*(content(torch.load(folder / "ckpt.pt")["model"]) for folder in (whole, out))) == 0
    (out / "best.pt").unlink()
    assert fit(out, text)[0] == 0 and load(out / "best.pt") and len(log_of(out)) == len(log_of(whole))


def test_checkpoints_of_earlier_versions(whole, tmp_path):
    """They have no digest; a checksum of each part finds what torch.load does not."""
    path, draw, unseen = tmp_path / "ckpt.pt", random.Random(5), 0
    checkpoint = torch.load(whole / "ckpt.pt", weights_only=True)
    del checkpoint["sealed"]
    torch.save(checkpoint, path)
    good, kept = path.read_bytes(), content(checkpoint["model"])
    assert load(path)[1]["state"] == checkpoint["state"] and not check_whole(path)
    start = good.index(checkpoint["model"]["embedding.weight"].numpy().tobytes())
    for place in draw.choices(range(start, start + 4000), k=several(10, 100)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        unseen += content(torch.load(path, weights_only=True)["model"]) != kept
        assert_refused(path, "is damaged or not a checkpoint of train.py .a part of it is not what was written")
        count("a byte of a checkpoint flipped", refused=1)
    assert unseen  # so the check is needed


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_checkpoints(whole, text, reviews, tmp_path):
    """Of another model, of other data, weights without a state, and pickles that would run code."""
    out, sprung = half_done(whole, text, tmp_path / "out"), tmp_path / "sprung"
    row = "foreign checkpoints, and pickles that would run code"
    good = {name: (out / name).read_bytes() for name in ("ckpt.pt", "best.pt")}
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)

    def torch_file(content):
        save(tmp_path / "made.pt", content)
        return (tmp_path / "made.pt").read_bytes()

    other = {**checkpoint, "model_config": {**checkpoint["model_config"], "n_embd": 32}}
    cases = [(good["best.pt"], "holds no optimizer, random:"), (torch_file(other), "is damaged or not a checkpoint"),
             (torch_file({**checkpoint, "optimizer": {}}), "a state of the optimiser that does not"),
             (torch_file({**checkpoint, "state": [1]}), "a state of the optimiser that does not"),
             (torch_file({**checkpoint, "model": Trap(sprung)}), "is damaged or not a checkpoint"),
             (torch_file({"sealed": Trap(sprung)}), "is damaged or not a checkpoint"),
             (pickle.dumps(Trap(sprung)), "is damaged or not a checkpoint"),
             (pickle.dumps({"model": Trap(sprung)}), "is damaged or not a checkpoint")]
    for content, said in cases:
        (out / "ckpt.pt").write_bytes(content)
        code, words = fit(out, text)
        assert code == 2 and said in words, words
        (out / "best.pt").write_bytes(content if "damaged" in said else good["best.pt"])
        if "damaged" in said:
            for name, more in (("sample", []), ("train", ["--eval_only=True", f"--dataset={text}"])):
                code, words = end(program(name, f"--out_dir={out}", *more))
                assert code == 2 and said in words, words
        (out / "best.pt").write_bytes(good["best.pt"])
        count(row, refused=1)
    assert not sprung.exists()
    (out / "ckpt.pt").write_bytes(good["ckpt.pt"])
    code, words = fit(out, reviews)
    assert code == 2 and "was trained on other data" in words and "expected" in words and "found" in words
    count(row, refused=1)
    assert_nothing_lost(row, whole, out, text)


# ---- numbers that are none ---------------------------------------------------------------------


@pytest.mark.parametrize("where, said", [("loss", "the training loss is nan"),
                                         ("gradient", "the norm of the gradient is (nan|inf)")])
def test_not_finite(whole, text, tmp_path, where, said):
    for step in several((12,), (11, 13, 15, 17, 19)):
        out = half_done(whole, text, tmp_path / str(step))
        code, words = fit(out, text, faults=[("remember_models", ()), ("at_batch", (2 * step, "poison", where))])
        assert code == 2 and re.search(f"{said} at step {step}: stopped; what is saved in {out} is from before",
                                       words), words
        for name in ("ckpt.pt", "best.pt"):
            assert all(tensor.isfinite().all() for tensor in load(out / name)[1]["model"].values())
        count("NaN or infinity in loss or gradients", refused=1)
        assert_nothing_lost("NaN or infinity in loss or gradients", whole, out, text)


# ---- other circumstances -----------------------------------------------------------------------


def test_resume_in_other_circumstances(whole, text, tmp_path):
    """Another precision, a longer run, and (where there is one) a GPU and back; each says what is not as it was."""
    cases = [(["--dtype=bfloat16"],
              "dtype was 'float32', is now 'bfloat16': the losses from here on differ by rounding"),
             (["--max_iters=30"], f"max_iters was {MAX}, is now 30")]
    if torch.cuda.is_available():
        cases += [(["--device=cuda"], "device was 'cpu', is now 'cuda'"),
                  (["--device=cuda", "--dtype=bfloat16"], "'bfloat16'")]
    for n, (arguments, said) in enumerate(cases):
        out = half_done(whole, text, tmp_path / str(n))
        code, words = end(begin(out, text, *arguments))
        assert code == 0 and said in words and "resume: from step 10" in words, words
        assert abs(load(out / "ckpt.pt")[1]["state"]["best"] - load(whole / "ckpt.pt")[1]["state"]["best"]) < 0.3
        code, words = end(begin(out, text, "--max_iters=35"))
        assert code == 0 and ("dtype was" in words) == ("dtype" in said)
        count("resumed on another device, in another precision, for more steps", 2, resumed=2)
