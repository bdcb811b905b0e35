"""Settings of a script: config files and --key=value set the script's own globals; and how a script ends.

`python train.py config/x.py --batch_size=8` runs the file's assignments and then sets the key; later arguments win.
Keys are the plain lower-case names at the top of the script. A config file is Python: it may read the settings made so
far, import, and compute; names that begin with _ are private to it. In a config file NAME = {"option": value, ...},
with the NAME of an attention mechanism, gives options that apply if this mechanism is chosen.
"""

import ast
import difflib
import math
import os
import re
import sys
import traceback
import types
from pathlib import Path

from core import ROOT, foreign

PLAIN = (bool, int, float, str, list)
ALIASES = {"use_adaptive_attention": ("attention", "adaptive_attention_span")}  # KEY=True means this key and value
OUT_OF_MEMORY = ("out of memory", "allocate memory", "size calculation overflowed")  # in torch's RuntimeErrors


class UserError(Exception):
    """An error that the user can correct: the message says what was expected, what came, what to do."""


# ---- the end of a script -----------------------------------------------------------------------


def run_main(main, stopped="stopped"):
    """Call a script's `main` and exit with what it returns.

    A UserError, an error of the system, a missing package or a lack of memory becomes one line on stderr and exit code
    2; Ctrl-C becomes the line `stopped` and exit code 130; a closed pipe exit code 141.
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    try:
        code = main()
        sys.stdout.flush()  # a failing flush at interpreter exit would print a traceback
        leave(code)
    except BrokenPipeError:  # as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ModuleNotFoundError as error:
        line, code = missing_package(error), 2
    except (UserError, OSError) as error:
        line, code = str(error), 2
    except (MemoryError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if not isinstance(error, MemoryError) and not any(part in reason.lower() for part in OUT_OF_MEMORY):
            raise
        line, code = f"not enough memory ({reason[:150]}); make the batch, the block or the model smaller", 2
    except KeyboardInterrupt:
        line, code = stopped, 130
    print_error(line)
    leave(code)


def print_error(line):
    """Print one line on stderr, after the script's name and, with several processes, the rank."""
    rank = int(os.environ.get("RANK", 0))
    where = Path(sys.argv[0]).name + f", rank {rank}" * (rank > 0)
    print(f"{where}: {' '.join(line.split(chr(10))).strip()}", file=sys.stderr)


def requirements_files(error):
    """The paths of the requirements files that list the package which a ModuleNotFoundError names."""
    package = re.compile(rf"^{re.escape((error.name or '').partition('.')[0])}=", re.M)
    return [path for path in sorted(ROOT.glob("requirements*.txt")) if package.search(path.read_text("utf-8"))]


def missing_package(error):
    """The line for a ModuleNotFoundError: the package, and which interpreter has it or which command installs it."""
    name, files, python = (error.name or str(error)).partition(".")[0], requirements_files(error), sys.executable
    if files and (ROOT / ".venv/bin/python").exists() and not os.path.samefile(sys.prefix, ROOT / ".venv"):
        python = ROOT / ".venv/bin/python"
        if files == [ROOT / "requirements.txt"]:
            return f"{name} is not installed for {sys.executable}: use {python}"
    return f"{name} is not installed: {python} -m pip install {f'-r {files[0]}' if files else name}"


def open_closed_streams():
    """Open the null device for each of standard input, output and error that is closed. Otherwise the next file to be
    opened would get its descriptor, and with it what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest free descriptor
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def leave(code):
    """End this process with an exit code (None: 0)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # PyTorch's threads of a process group abort an orderly exit
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


# ---- words for messages ------------------------------------------------------------------------


def did_you_mean(name, names):
    """'; did you mean NAME?' with the closest of names, or '; there are NAMES' if none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names)) or 'none'}"


def check_choice(key, value, names):
    """Raise UserError unless `value` is one of `names`."""
    if value not in names:
        raise UserError(f"unknown {key} {value!r}{did_you_mean(str(value), names)}")


def short_repr(value, length=80):
    """The repr of a value, cut to `length` characters."""
    try:
        text = repr(value)
    except Exception:  # Python refuses to print an int of 5,000 digits
        return "that cannot be printed"
    return text if len(text) <= length else text[:length] + "..."


def one_line(error, length=300):
    """The message of an exception on one line, cut to `length` characters."""
    try:
        return " ".join(str(error).split())[:length]
    except Exception:  # as in short_repr
        return "(no readable message)"


# ---- settings ----------------------------------------------------------------------------------


def mechanism_files():
    """{name: text} of the top-level files that hold an attention mechanism; none is imported."""
    files = {file.stem: file.read_text("utf-8", "replace") for file in sorted(ROOT.glob("*.py"))}
    return {name: text for name, text in files.items() if "\nclass Attention(" in text}


def mechanisms_with(option):
    """The names of the attention mechanisms that have an option of this name."""
    return [name for name, text in mechanism_files().items() if f"\n{option} = " in text]


def plain_values(space):
    """The settings among a script's or a module's names: lower-case plain values, by name."""
    return {key: value for key, value in space.items() if key.islower() and key[0] != "_" and type(value) in PLAIN}


def configure(script, arguments=None, more=None, inherit=None):
    """Set the globals `script` from the command line. Returns (the script's settings, the further keys' values).

    arguments: default sys.argv[1:]. more: a function of all settings that returns further keys with their defaults (the
    options of the chosen mechanism). inherit: a function of the settings that returns values, by name, for settings and
    further keys that are not given. Raises UserError, and sets no global, for unknown keys and values of another type.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    defaults = plain_values(script)
    aliases = {key: meaning for key, meaning in ALIASES.items() if meaning[0] in defaults}
    if "--help" in arguments or "-h" in arguments:
        print_help(script.get("__doc__"), defaults, aliases)
        sys.exit(0)
    settings, assigned = assign(arguments, defaults, {})
    if inherited := inherit(settings) if inherit else {}:
        settings, assigned = assign(arguments, defaults, inherited)
    further = more(settings) if more else {}
    options = further | {key: inherited[key] for key in further if type(inherited.get(key)) is type(further[key])}
    for key, value, where in flatten_options(assigned, settings) if more else assigned:
        if key in further:
            options[key] = convert(key, value, further[key], where)
        elif key not in defaults:
            hint = foreign.explain_setting(key) or did_you_mean(str(key), [*defaults, *aliases, *further])
            if owners := mechanisms_with(key) if more else []:
                flags = [f"; add --{alias}=True" for alias, (_, name) in aliases.items() if name in owners]
                hint = f"; it belongs to --attention={' or '.join(owners)}{''.join(flags)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
    script.update(settings)
    return settings, options


def assign(arguments, defaults, inherited):
    """(settings, [(key, value, where)] as assigned in order): `defaults`, replaced by the values in `inherited`, then
    by those of a command line."""
    settings, assigned = {key: inherited.get(key, value) for key, value in defaults.items()}, []
    for key, value, where in assignments(arguments, settings):
        if key in ALIASES and ALIASES[key][0] in defaults:  # False takes back an earlier True; other choices stay
            is_set, (key, meaning) = convert(key, value, False, where), ALIASES[key]
            value = meaning if is_set else defaults[key] if settings[key] == meaning else settings[key]
        if key in defaults:
            settings[key] = convert(key, value, defaults[key], where)
        assigned.append((key, value, where))
    return settings, assigned


def print_help(doc, defaults, aliases):
    """Print a script's docstring and its settings."""
    print(f"{(doc or '').strip()}\n\nsettings (--key=value) and their defaults:")
    print("\n".join(f"  {key} = {value!r}" for key, value in defaults.items()))
    print("".join(f"  {alias}=True means {key}={value}\n" for alias, (key, value) in aliases.items()), end="")


class Text(str):
    """A value from the command line, not yet converted to its type."""


def assignments(arguments, settings):
    """Yield (key, value, where) for each assignment of a command line. Config files see `settings` as they are then."""
    for argument in arguments:
        if argument.startswith("--") and "=" in argument:
            key, value = argument[2:].split("=", 1)
            yield key, Text(value), f"--{key}"
        elif argument.startswith("-"):
            raise UserError(f"expected --key=value or a config file, got {argument!r}")
        else:
            for key, value in read_config_file(argument, settings):
                yield key, value, argument


def flatten_options(assigned, settings):
    """The assignments (key, value, where). A dict of a mechanism's options is replaced by its items if the mechanism is
    chosen, and left out otherwise. Raises UserError for an option that such another mechanism does not have."""
    flat = []
    for key, value, where in assigned:
        if not isinstance(value, dict) or key in settings or key not in mechanism_files():
            flat.append((key, value, where))
        elif key == settings["attention"]:
            flat += [(*option, where) for option in value.items()]
        elif unknown := [option for option in value if key not in mechanisms_with(option)]:
            raise UserError(f"{where}: unknown key {unknown[0]!r} in the options of {key}")
    return flat


def read_config_file(name, settings):
    """The assignments of a config file, [(key, value)], run with the settings made so far as its globals.

    A name that is not found from the working directory is looked up from the repository's root.
    """
    try:
        path = ROOT / name if not Path(name).exists() and (ROOT / name).is_file() else name
        source = Path(path).read_text("utf-8-sig")  # with or without a byte order mark
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise UserError(f"cannot read config file {name!r} ({error}); give a Python file or --key=value")
    space = dict(settings)
    try:
        exec(compile(source, name, "exec"), space)
    except (Exception, SystemExit) as error:  # a file that exits would end the script with the exit code of success
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        line, reason = (lines or [1])[-1], one_line(error)
        if isinstance(error, SyntaxError):
            line, reason = error.lineno or 1, error.msg
        raise UserError(f"{name}, line {line}: {type(error).__name__}: {reason}")
    public = {key: value for key, value in space.items() if key[0] != "_" and not callable(value)}
    return [(key, value) for key, value in public.items() if not isinstance(value, types.ModuleType)
            and (key not in settings or value is not settings[key])]


def convert(key, value, default, where):
    """`value` as the type of `default`; an int is accepted as a float, a list of texts as one text with commas.

    Raises UserError for a value of another type, an int of more than 64 bits, a float that is not finite, or a NUL.
    """
    expected = type(default)
    if isinstance(value, Text):
        value = parse(str(value), expected)
    if expected is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if expected is str and type(value) is list and all(type(part) is str for part in value):
        value = ",".join(value)
    limit = ""
    if type(value) is expected:
        if expected is int and not -(2**63) <= value < 2**63:  # the range of torch's and NumPy's integers
            limit = ", below 2**63 in size"
        elif expected is float and not math.isfinite(value):
            limit = ", finite"
        elif expected is str and "\0" in value:  # no path may contain it
            limit = ", without NUL characters"
    if limit or type(value) is not expected:
        got = f"{type(value).__name__} {short_repr(value)}"
        raise UserError(f"{where}: {key} expects {expected.__name__} (like {default!r}){limit}, got {got}")
    return value


def parse(text, expected):
    """The Python value that a text of the command line stands for, where a value of the type `expected` is due."""
    if expected is str:
        return text
    if expected is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
