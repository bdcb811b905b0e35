"""The configurator: nanoGPT's command line, and a clear line for whatever is wrong with it."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies

from core.config import UserError, check_choice, configure, run_main

ROOT = Path(__file__).resolve().parents[2]


def script(**more):
    """The globals of a made-up script."""
    return {"__doc__": "A script.", "batch_size": 16, "learning_rate": 1e-3, "compile": False, "out_dir": "out",
            "attention": "dense", "layers": [1, 2], "_own": 3, "LIMIT": 4, "nothing": None, "path": Path(), **more}


def options_of(settings):
    """A mechanism's options, by the mechanism chosen."""
    return {"dense": {}, "adaptive_attention_span": {"soft": 2.0},
            "sparse": {"window": 32, "soft": 1.0, "pattern": "local", "spread": []}}[settings["attention"]]


def settle(*line, **more):
    """(all settings, options) after a command line."""
    names = script()
    values, options = configure(names, list(line), options_of)
    assert all(names[key] == value for key, value in values.items())
    return values, options


def refusal(*line):
    """What a command line is refused with; the script's globals must be as they were."""
    names = script()
    with pytest.raises(UserError) as error:
        configure(names, list(line), options_of)
    assert names == script() and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file and gives its path."""

    def write(text, name="x.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_defaults_and_what_is_a_key():
    values, options = settle()
    assert values == {"batch_size": 16, "learning_rate": 1e-3, "compile": False, "out_dir": "out", "attention": "dense",
                   "layers": [1, 2]}
    assert options == {}


def test_the_line_decides_in_its_order(config):
    file, other = config("batch_size = 8\nout_dir = 'a'"), config("batch_size = 4", "y.py")
    assert settle(file)[0]["batch_size"] == 8
    assert settle(file, "--batch_size=2")[0]["batch_size"] == 2
    assert settle("--batch_size=2", file)[0]["batch_size"] == 8
    assert settle(file, other)[0]["batch_size"] == 4 and settle(other, file)[0]["batch_size"] == 8
    assert settle("--batch_size=2", "--batch_size=3")[0]["batch_size"] == 3
    assert settle(file, "--batch_size=2")[0]["out_dir"] == "a"


def test_a_file_that_sets_a_default_again_counts(config):
    assert settle("--batch_size=2", config("batch_size = 16"))[0]["batch_size"] == 16


def test_files_are_python(config):
    file = config("""
from math import sqrt, pi as _pi
import os
_half = batch_size // 2  # the settings made so far are at hand
batch_size = _half
layers = [batch_size + n for n in range(2)]  # and the file's own names, in every scope
def _twice(x):
    return 2 * x + 0 * batch_size
learning_rate = _twice(sqrt(4.0))
""")
    values, _ = settle("--batch_size=10", file)
    assert (values["batch_size"], values["layers"], values["learning_rate"]) == (5, [5, 6], 4.0)


@pytest.mark.parametrize("argument, key, value", [
    ("--out_dir=a=b=c", "out_dir", "a=b=c"), ("--out_dir=", "out_dir", ""), ("--out_dir=10", "out_dir", "10"),
    ("--out_dir=1e-3", "out_dir", "1e-3"), ("--out_dir=True", "out_dir", "True"), ("--out_dir='x'", "out_dir", "'x'"),
    ("--batch_size=-3", "batch_size", -3), ("--batch_size=1_000", "batch_size", 1000),
    ("--learning_rate=1", "learning_rate", 1.0), ("--learning_rate=1e-4", "learning_rate", 1e-4),
    ("--compile=True", "compile", True), ("--compile=true", "compile", True), ("--compile=False", "compile", False),
    ("--layers=[3, 4]", "layers", [3, 4]),
])
def test_values(argument, key, value):
    got = settle(argument)[0][key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argument, message", [
    ("--batch_size=1.5", "--batch_size: batch_size expects int (like 16), got float 1.5"),
    ("--batch_size=many", "--batch_size: batch_size expects int (like 16), got str 'many'"),
    ("--batch_size=True", "--batch_size: batch_size expects int (like 16), got bool True"),
    ("--batch_size=", "--batch_size: batch_size expects int (like 16), got str ''"),
    ("--learning_rate=fast", "--learning_rate: learning_rate expects float (like 0.001), got str 'fast'"),
    ("--learning_rate=nan", "--learning_rate: learning_rate expects float (like 0.001), got str 'nan'"),
    ("--compile=1", "--compile: compile expects bool (like False), got int 1"),
    ("--compile=yes", "--compile: compile expects bool (like False), got str 'yes'"),
    ("--layers=(1, 2)", "--layers: layers expects list (like [1, 2]), got tuple (1, 2)"),
    ("--batch_siz=3", "--batch_siz: unknown key 'batch_siz'; did you mean batch_size?"),
    ("--batch-size=3", "--batch-size: unknown key 'batch-size'; did you mean batch_size?"),
    ("--zzz=3",
     "--zzz: unknown key 'zzz'; there are attention, batch_size, compile, layers, learning_rate, out_dir, use_"),
    ("--LIMIT=3", "--LIMIT: unknown key 'LIMIT'"), ("--_own=3", "--_own: unknown key '_own'"),
    ("--nothing=3", "--nothing: unknown key 'nothing'"),
    ("--batch_size", "expected --key=value or a config file, got '--batch_size'"),
    ("-b=3", "expected --key=value or a config file, got '-b=3'"),
])
def test_refused(argument, message):
    assert refusal(argument).startswith(message)


@pytest.mark.parametrize("text, message", [
    ("batch_siz = 3", "x.py: unknown key 'batch_siz'; did you mean batch_size?"),
    ("batch_size = 2.5", "x.py: batch_size expects int (like 16), got float 2.5"),
    ("batch_size = None", "x.py: batch_size expects int (like 16), got NoneType None"),
    ("learning_rate = 10 ** 5000", "x.py: learning_rate expects float (like 0.001), got int"),
    ("batch_size = 8\n\nbatch_size = = 3", "x.py, line 3: SyntaxError: invalid syntax"),
    ("batch_size = 8\nbatch_size = 1 / 0\n", "x.py, line 2: ZeroDivisionError: division by zero"),
    ("def f():\n    return missing\nbatch_size = f()", "x.py, line 2: NameError: name 'missing' is not defined"),
    ("import json\njson.loads('{')", "x.py, line 2: JSONDecodeError"),
    ("import no_such_module", "x.py, line 1: ModuleNotFoundError"),
    ("raise KeyError", "x.py, line 1: KeyError"),
    ("x = '\0'", "x.py, line 1: "),
])
def test_refused_files(config, text, message):
    file = config(text)
    assert message in refusal(file) and refusal(file).startswith(file)


def test_missing_files(tmp_path):
    assert "cannot read config file" in refusal(str(tmp_path / "no.py")) and "No such file" in refusal("no.py")
    assert "cannot read config file" in refusal(str(tmp_path))
    (tmp_path / "a.py").write_bytes(b"\xff")
    assert "cannot read config file" in refusal(str(tmp_path / "a.py"))


def test_options_of_the_mechanism(config):
    file = config("attention = 'sparse'\nwindow = 64")
    defaults = {"window": 32, "soft": 1.0, "pattern": "local", "spread": []}
    assert settle("--attention=sparse")[1] == defaults
    assert settle("--window=8", "--attention=sparse")[1]["window"] == 8
    assert settle("--attention=sparse", "--window=8")[1]["window"] == 8
    assert settle(file)[1] == {**defaults, "window": 64} and settle("--window=8", file)[1]["window"] == 64
    assert settle(file, "--window=8")[1]["window"] == 8 and settle(file, "--soft=2")[1]["soft"] == 2.0
    assert "window" not in settle(file)[0]
    assert "did you mean window?" in refusal(file, "--windo=3")
    assert "expects int (like 32), got str 'x'" in refusal(file, "--window=x")


@pytest.mark.parametrize("option, value", [("window", 8), ("soft", 0.5), ("pattern", "a,b"), ("spread", [1, 2.5])])
def test_an_option_in_a_file_is_the_option_on_the_line(config, option, value):
    on_the_line = f"--{option}={value}"
    lines = "attention = 'sparse'", f"{option} = {value!r}"
    for file in (config("\n".join(lines)), config("\n".join(lines[::-1]))):
        assert settle(file)[1] == settle("--attention=sparse", on_the_line)[1] != settle("--attention=sparse")[1]


def test_a_list_serves_where_a_text_with_commas_is_expected(config):
    assert settle(config("attention = 'sparse'\npattern = ['local', 'dense']"))[1]["pattern"] == "local,dense"
    assert settle(config("out_dir = ['a']"))[0]["out_dir"] == "a"
    # On the command line it is a text already.
    assert settle("--attention=sparse", "--pattern=['local']")[1]["pattern"] == "['local']"
    assert "out_dir expects str (like 'out'), got list ['a', 1]" in refusal(config("out_dir = ['a', 1]"))
    assert "layers expects list (like [1, 2]), got str 'a,b'" in refusal("--layers=a,b")


def test_an_option_without_its_mechanism(config, tmp_path, monkeypatch):
    """Is refused with the mechanisms whose files have it. The files are read, not imported: none of these could be."""
    files = {"sparse": "window = 3\n\nclass Attention(Base):\n", "wide": "window = 3\nclass Attention(Base):\n",
             "span": "length = 3\nclass Attention(Base):\n    window = 3\n", "other": "window = 3\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text('"""A file."""\n' + text)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\nlength = 3\nclass Attention(Base):\n")
    monkeypatch.setattr("core.config.ROOT", tmp_path)
    belongs = "unknown key 'window'; it belongs to --attention=sparse or wide"
    file = config("attention = 'sparse'\nwindow = 64")
    assert refusal("--window=8") == f"--window: {belongs}"
    assert refusal(file, "--attention=dense") == f"{file}: {belongs}"
    assert refusal("--length=8") == "--length: unknown key 'length'; it belongs to --attention=latin or span"
    for key in ("windo", "class", '"""A', "", "*"):
        assert "belongs" not in refusal(f"--{key}=8")
    with pytest.raises(UserError, match="unknown key 'window'; there are"):  # without `more`
        configure(script(), ["--window=8"])


@pytest.mark.parametrize("keys, chosen", [
    ([True], "adaptive_attention_span"), ([False], "dense"), (["sparse", False], "sparse"),
    ([False, "sparse"], "sparse"),
    (["sparse", True], "adaptive_attention_span"), ([True, "sparse"], "sparse"), ([True, False], "dense"),
    ([False, True], "adaptive_attention_span"), ([True, "sparse", False], "sparse"),
])
def test_use_adaptive_attention(config, keys, chosen):
    """The public flag is the mechanism's name, on the line and in files, and no setting of its own."""
    pairs = [("use_adaptive_attention" if type(key) is bool else "attention", key) for key in keys]
    files = [config(f"{key} = {value!r}", f"{n}.py") for n, (key, value) in enumerate(pairs)]
    for arguments in ([f"--{key}={value}" for key, value in pairs], files):
        values, options = settle(*arguments)
        assert values["attention"] == chosen and values.keys() == settle()[0].keys() and options == options_of(values)


def test_use_adaptive_attention_brings_its_options(config):
    assert settle("--soft=3", "--use_adaptive_attention=True")[1] == {"soft": 3.0}
    assert settle(config("use_adaptive_attention = True\nsoft = 3"))[1] == {"soft": 3.0}
    assert settle("--use_adaptive_attention=True", config("out_dir = 'out-' + attention"))[0]["out_dir"] == \
        "out-adaptive_attention_span"  # a file sees it as chosen


@pytest.mark.parametrize("value, came", [
    ("1", "int 1"), ("yes", "str 'yes'"), ("", "str ''"), ("None", "NoneType None")])
def test_use_adaptive_attention_is_true_or_false(config, value, came):
    message = f"use_adaptive_attention expects bool (like False), got {came}"
    assert refusal(f"--use_adaptive_attention={value}") == f"--use_adaptive_attention: {message}"
    file = config(f"use_adaptive_attention = {value if value in ('1', 'None') else repr(value)}")
    assert refusal(file) == f"{file}: {message}"


def test_use_adaptive_attention_where_there_is_no_attention(capsys):
    names = script()
    del names["attention"]
    with pytest.raises(UserError, match="unknown key 'use_adaptive_attention'; there are batch_size"):
        configure(names, ["--use_adaptive_attention=True"])
    with pytest.raises(SystemExit):
        configure(names, ["--help"])
    assert "adaptive" not in capsys.readouterr().out
    assert refusal("--use_adaptive_atention=True").endswith("; did you mean use_adaptive_attention?")


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        settle("--help")
    printed = capsys.readouterr().out
    assert not left.value.code and "A script." in printed and "  learning_rate = 0.001" in printed
    assert "_own" not in printed
    assert printed.endswith("  use_adaptive_attention=True means attention=adaptive_attention_span\n")


@given(strategies.lists(
    strategies.text() | strategies.text().map("--batch_size={}".format) | strategies.text().map("--layers={}".format)
    | strategies.tuples(strategies.sampled_from(list(script())),
                        strategies.text("0123456789.e-_[]{}(),:'\"xj", max_size=12))
    .map("--{0[0]}={0[1]}".format).filter(lambda argument: not argument.startswith("--attention")), max_size=3))
@settings(max_examples=300, deadline=None)
@example(["--layers={[]: 1}"])
@example(["--learning_rate=" + "9" * 5000])
@example(["--learning_rate=0x" + "f" * 5000])
@example(["--batch_size=" + "(" * 5000])
@example(["\0"])
def test_no_argument_gives_a_traceback(line):
    try:
        configure(script(), [argument for argument in line if argument not in ("-h", "--help")], options_of)
    except UserError:
        pass


def test_choose():
    check_choice("pos", "rope", ("rope", "learned"))
    with pytest.raises(UserError, match="unknown pos 'rop'; did you mean rope"):
        check_choice("pos", "rop", ("rope", "learned"))
    with pytest.raises(UserError, match="unknown pos 'x'; there are learned, rope"):
        check_choice("pos", "x", ("rope", "learned"))


@pytest.mark.parametrize("raised, code, message", [
    (UserError("expected this, got that"), 2, "x.py: expected this, got that\n"),
    (PermissionError(13, "Permission denied", "out"), 2, "x.py: [Errno 13] Permission denied: 'out'\n"),
    (ModuleNotFoundError("No module", name="wandb"), 2,
     f"x.py: wandb is not installed: {sys.executable} -m pip install wandb\n"),
    (KeyboardInterrupt(), 130, "x.py: stopped\n"),
])
def test_run(raised, code, message, monkeypatch, capsys):
    def main():
        raise raised

    monkeypatch.setattr(sys, "argv", ["/a/b/x.py"])
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == code and capsys.readouterr().err == message


def test_run_leaves_with_what_main_returns():
    for returned, code in ((None, None), (0, 0), (130, 130)):
        with pytest.raises(SystemExit) as left:
            run_main(lambda: returned)
        assert left.value.code == code


def test_run_does_not_hide_a_mistake_of_ours():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


@pytest.mark.parametrize("lines", [1, 10**5], ids=["at-the-end", "midway"])
def test_run_when_the_reader_goes(lines):
    program = ("from core.config import run_main\n"
               f"run_main(lambda: (input(), [print('x' * 80) for _ in range({lines})])[0])")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()
