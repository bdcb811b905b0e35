"""What a config file can do wrong is told in one line, and what it can say of mechanisms that may be chosen later."""

import sys

import pytest
from test_configurator import config, refusal, settle  # noqa: F401

import compare
import train
from core.config import UserError, configure, run_main
from helpers import ROOT


@pytest.mark.parametrize("text, message", [
    ("import sys\nsys.exit(0)", "x.py, line 2: SystemExit: 0"), ("exit()", "x.py, line 1: SystemExit: None"),
    ("raise ValueError('one\\ntwo\\n\\nthree')", "x.py, line 1: ValueError: one two three"),
    ("raise ValueError(10 ** 5000)", "x.py, line 1: ValueError: (no readable message)"),
    ("raise ValueError('x' * 5000)", "x.py, line 1: ValueError: xxx"),
    ("batch_size = 10 ** 5000",
     "x.py: batch_size expects int (like 16), below 2**63 in size, got int that cannot be printed"),
    ("batch_size = -2 ** 63 - 1", "x.py: batch_size expects int (like 16), below 2**63 in size, got int -92"),
    ("learning_rate = float('inf')", "x.py: learning_rate expects float (like 0.001), finite, got float inf"),
    ("learning_rate = float('nan')", "x.py: learning_rate expects float (like 0.001), finite, got float nan"),
    ("out_dir = 'a\\0b'", "x.py: out_dir expects str (like 'out'), without NUL characters, got str 'a\\x00b'"),
])
def test_one_line(config, text, message):
    line = refusal(config(text))
    assert message in line and len(line) < 500


def test_exit_code_of_a_file_that_exits(config, refused):
    """A config file that exits does not end the script as if it had trained."""
    assert "SystemExit" in refused(train, config("import sys\nsys.exit(0)"))


@pytest.mark.parametrize("key, value", [
    ("batch_size", "9" * 30), ("batch_size", str(-(10**30))), ("learning_rate", "1e999"), ("learning_rate", "-1e999"),
    ("batch_size", "1e999")])
def test_large_numbers_on_the_line(key, value):
    assert refusal(f"--{key}={value}").startswith(f"--{key}: {key} expects")
    assert settle(f"--batch_size={2**63 - 1}")[0]["batch_size"] == 2**63 - 1


def test_byte_order_mark(tmp_path):
    """Editors of Windows write one."""
    (tmp_path / "x.py").write_bytes(b"\xef\xbb\xbfbatch_size = 8\n")
    assert settle(str(tmp_path / "x.py"))[0]["batch_size"] == 8


def test_from_any_working_directory(tmp_path, monkeypatch):
    """A relative name is looked up from the working directory, and then from the repository's root."""
    for folder, size in (("repository", 4), ("elsewhere", 8)):
        (tmp_path / folder / "config").mkdir(parents=True)
        (tmp_path / folder / "config" / "x.py").write_text(f"batch_size = {size}")
    monkeypatch.setattr("core.config.ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    assert settle("config/x.py")[0]["batch_size"] == 4
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert settle("config/x.py")[0]["batch_size"] == 8
    message = "cannot read config file 'config/y.py' ([Errno 2] No such file or directory: 'config/y.py')"
    assert message in refusal("config/y.py")
    (tmp_path / "repository" / "config" / "y.py").write_text("batch_size = 0.5")
    assert refusal("config/y.py").startswith("config/y.py: batch_size expects int")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert configure(dict(compare.TRAIN), ["config/train_toy.py"], train.mechanism_options)[0]["dataset"] == "toy"


def test_run_prints_one_line(monkeypatch, capsys):
    def main():
        raise UserError("no folder 'a\nb'\n")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == "x.py: no folder 'a b'\n"


# ---- options of a mechanism that may be chosen later -------------------------------------------


def test_options_in_a_dict(config):
    """They count where the mechanism is chosen, before or after the file, in the order of the line; else they wait."""
    file = config("sparse = {'window': 64}")
    assert settle(file)[1] == {}
    for line in ((file, "--attention=sparse"), ("--attention=sparse", file)):
        assert settle(*line)[1]["window"] == 64
    assert settle(file, "--attention=sparse", "--window=8")[1]["window"] == 8
    assert settle("--window=8", file, "--attention=sparse")[1]["window"] == 64


@pytest.mark.parametrize("text, message", [
    ("sparse = {'windo': 64}", "x.py: unknown key 'windo'"), ("sparse = {3: 64}", "x.py: unknown key 3"),
    ("spars = {'window': 64}", "x.py: unknown key 'spars'"), ("out_dir = {'window': 64}", "x.py: out_dir expects str"),
])
def test_options_in_a_dict_refused(config, text, message):
    assert message in refusal(config(text)) and message in refusal(config(text), "--attention=sparse")


def test_span_reg_of_enwik8():
    """The span configuration of the full-size run, as in DESIGN.md's command; dense attention has no such option."""
    def options(*line):
        return configure(dict(compare.TRAIN), [str(ROOT / "config/train_enwik8.py"), *line], train.mechanism_options)[1]

    assert options("--use_adaptive_attention=True")["span_reg"] == 4e-6
    assert options("--use_adaptive_attention=True", "--span_reg=1e-6")["span_reg"] == 1e-6
    assert "span_reg" not in options()


def test_periodic_masking_without_spans(refused, text, tmp_path):
    line = refused(train, "--use_triangle_wave_masking=True", f"--dataset={text}", f"--out_dir={tmp_path / 'out'}")
    assert "it belongs to --attention=adaptive_attention_span; add --use_adaptive_attention=True" in line
    assert not (tmp_path / "out").exists()
