"""Settings of a script: config files and --key=value, onto the script's own globals.

`python train.py config/x.py --batch_size=8` runs the file's assignments and then sets the key;
what stands later on the line wins. Keys are the plain lower-case names at the top of the script.
A config file is Python: it may read the settings made so far, import, and compute; names that
begin with _ are its own. NAME = {"option": value, ...}, with the NAME of an attention mechanism, gives
options of that mechanism, which count if it is the chosen one.
"""

import ast
import difflib
import math
import os
import sys
import traceback
import types
from pathlib import Path

from core import ROOT

PLAIN = (bool, int, float, str, list)
ALIASES = {"use_adaptive_attention": ("attention", "adaptive_attention_span")}  # KEY=True means this key and value
TOO_LARGE = ("out of memory", "allocate memory", "size calculation overflowed")  # how torch says it


class UserError(Exception):
    """Something the user can mend: the message says what was expected, what came, what to do."""


def run(main, stopped="stopped"):
    """Call a script's `main` and leave with what it returns. What the user or the system did wrong
    becomes one line on stderr and exit code 2; Ctrl-C the line `stopped` and 130."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    name = Path(sys.argv[0]).name
    try:
        code = main()
        sys.stdout.flush()  # here, where a reader that has gone is no traceback
        leave(code)
    except BrokenPipeError:  # `sample.py | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ModuleNotFoundError as error:
        line, code = f"{error.name} is not installed: pip install {error.name}", 2
    except (UserError, OSError) as error:
        line, code = str(error), 2
    except (MemoryError, RuntimeError) as error:  # torch says it as a RuntimeError
        said = (str(error).splitlines() or [""])[0]
        if not (isinstance(error, MemoryError) or any(part in said.lower() for part in TOO_LARGE)):
            raise
        line, code = f"there is not memory enough ({said[:150]}); make the batch, the block or the model smaller", 2
    except KeyboardInterrupt:
        line, code = stopped, 130
    rank = int(os.environ.get("RANK", 0))
    print(f"{name}{f', rank {rank}' * (rank > 0)}: {' '.join(line.split(chr(10))).strip()}", file=sys.stderr)
    leave(code)


def open_closed_streams():
    """Put the null device where standard input, output or error is closed: the next file that is opened would get its
    descriptor, and what libraries print with it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest that is free
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def leave(code):
    """End this process with an exit code (None: 0)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun's: threads of PyTorch's that outlive the interpreter abort the process
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def nearest(name, names):
    """'; did you mean NAME?' for the closest of names, or a list of them where none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names)) or 'none'}"


def check_choice(key, value, names):
    """Raise UserError unless `value` is one of `names`."""
    if value not in names:
        raise UserError(f"unknown {key} {value!r}{nearest(str(value), names)}")


def mechanism_files():
    """{name: text} of the top-level files that hold an attention mechanism; none is imported."""
    files = {file.stem: file.read_text("utf-8", "replace") for file in sorted(ROOT.glob("*.py"))}
    return {name: text for name, text in files.items() if "\nclass Attention(" in text}


def mechanisms_with(option):
    """The attention mechanisms that have an option of this name."""
    return [name for name, text in mechanism_files().items() if f"\n{option} = " in text]


def plain_values(space):
    """The settings among a script's or a module's names: lower-case plain values, by name."""
    return {key: value for key, value in space.items() if key.islower() and key[0] != "_" and type(value) in PLAIN}


def configure(script, arguments=None, more=None):
    """Set the globals `script` from the command line.

    arguments: the command line (default sys.argv[1:]). more: called with all settings, returns
    further keys with their defaults (a mechanism's options, which depend on the mechanism chosen).
    Returns (the script's settings, the further keys' values). Raises UserError for an unknown key
    or a value of another type; nothing is set then.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    defaults = plain_values(script)
    aliases = {key: meaning for key, meaning in ALIASES.items() if meaning[0] in defaults}
    if "--help" in arguments or "-h" in arguments:
        print(f"{(script.get('__doc__') or '').strip()}\n\nsettings (--key=value) and their defaults:")
        print("\n".join(f"  {key} = {value!r}" for key, value in defaults.items()))
        print("".join(f"  {key}=True means {meant}={value}\n" for key, (meant, value) in aliases.items()), end="")
        sys.exit(0)
    assigned = []  # (key, value, where), in the order of the line
    settings = dict(defaults)

    def assign(key, value, where):
        if key in aliases:  # False takes back an earlier True, and leaves any other choice
            on, (key, meant) = typed(key, value, False, where), aliases[key]
            value = meant if on else defaults[key] if settings[key] == meant else settings[key]
        assigned.append((key, value, where))
        if key in defaults:
            settings[key] = typed(key, value, defaults[key], where)

    for argument in arguments:
        if argument.startswith("--") and "=" in argument:
            key, value = argument[2:].split("=", 1)
            assign(key, Text(value), f"--{key}")
        elif argument.startswith("-"):
            raise UserError(f"expected --key=value or a config file, got {argument!r}")
        else:
            for key, value in read(argument, settings):
                assign(key, value, argument)
    further = more(settings) if more else {}
    options = dict(further)
    for key, value, where in options_in_dicts(assigned, settings) if more else assigned:
        if key in further:
            options[key] = typed(key, value, further[key], where)
        elif key not in defaults:
            if more and (owners := mechanisms_with(key)):
                flags = [f"; add --{alias}=True" for alias, (_, name) in aliases.items() if name in owners]
                raise UserError(f"{where}: unknown key {key!r}; it belongs to --attention={' or '.join(owners)}{''.join(flags)}")
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), [*defaults, *aliases, *further])}")
    script.update(settings)
    return settings, options


def options_in_dicts(assigned, settings):
    """The assignments (key, value, where) with each dict of a mechanism's options replaced by these, or by nothing where
    another mechanism is chosen. Raises UserError for an option that the other mechanism does not have."""
    flat = []
    for key, value, where in assigned:
        if not isinstance(value, dict) or key in settings or key not in mechanism_files():
            flat.append((key, value, where))
        elif key == settings["attention"]:
            flat += [(option, its_value, where) for option, its_value in value.items()]
        elif unknown := [option for option in value if key not in mechanisms_with(option)]:
            raise UserError(f"{where}: unknown key {unknown[0]!r} in the options of {key}")
    return flat


class Text(str):
    """A value from the command line, not yet of its type."""


def read(path, settings):
    """The assignments of a config file, [(key, value)], run with the settings made so far at hand."""
    beside = ROOT / path  # so that config/x.py works from any working directory
    try:
        source = (beside if not os.path.exists(path) and beside.is_file() else Path(path)).read_text("utf-8-sig")  # with or without a byte order mark
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name of a file at all
        raise UserError(f"cannot read config file {path!r} ({error}); give a Python file or --key=value")
    space = dict(settings)
    try:
        exec(compile(source, path, "exec"), space)
    except (Exception, SystemExit) as error:  # a file that exits would end the script as if all were done
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line, said = (lines or [1])[-1], message(error)
        if isinstance(error, SyntaxError):
            line, said = error.lineno or 1, error.msg
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {said}")
    return [
        (key, value) for key, value in space.items()
        if key[0] != "_" and not isinstance(value, types.ModuleType) and not callable(value)
        and (key not in settings or value is not settings[key])
    ]


def typed(key, value, default, where):
    """`value` as the type of `default`; an int serves for a float, a list of texts for one with commas."""
    expected = type(default)
    if isinstance(value, Text):
        value = str(value)
        if expected is bool and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        elif expected is not str:
            try:
                value = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                pass  # the text itself is what came
    if expected is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if expected is str and type(value) is list and all(type(part) is str for part in value):
        value = ",".join(value)
    wrong = type(value) is not expected
    limit = "" if wrong else limits(value)
    if wrong or limit:
        came = f"{type(value).__name__} {shown(value)}"
        raise UserError(f"{where}: {key} expects {expected.__name__} (like {default!r}){limit}, got {came}")
    return value


def limits(value):
    """What is expected of a value of this type that this value is not, as ', ...', or ''."""
    if type(value) is int and not -(2**63) <= value < 2**63:  # torch and NumPy hold no larger one
        return ", below 2**63 in size"
    if type(value) is float and not math.isfinite(value):
        return ", finite"
    if type(value) is str and "\0" in value:  # no path can hold it
        return ", without NUL characters"
    return ""


def message(error, length=300):
    """The message of an exception on one line, cut to `length` characters."""
    try:
        return " ".join(str(error).split())[:length]
    except Exception:  # as where the message is an int of 5,000 digits
        return "(no readable message)"


def shown(value, length=80):
    """A value for a message: not much longer than `length`."""
    try:
        text = repr(value)
    except Exception:  # Python refuses to print an int of 5,000 digits, too
        return "that cannot be printed"
    return text if len(text) <= length else text[:length] + "..."
