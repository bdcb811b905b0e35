"""Settings of a script: a config file and --key=value, onto the script's own globals.

`python train.py config/x.py --batch_size=8` runs the file's assignments and then sets the key;
what stands later on the line wins. Keys are the plain lower-case names at the top of the script.
"""

import ast
import difflib
import sys
import traceback
import types
from pathlib import Path

PLAIN = (bool, int, float, str, list)


class UserError(Exception):
    """Something the user can mend: the message says what was expected, what came, what to do."""


def run(main):
    """Call a script's main; a UserError becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def nearest(name, names):
    """'; did you mean NAME?' for the closest of names, or a list of them where none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names)) or 'none'}"


def choose(key, value, names):
    """Raise UserError unless `value` is one of `names`."""
    if value not in names:
        raise UserError(f"unknown {key} {value!r}{nearest(str(value), names)}")


def configure(script, arguments=None, more=None):
    """Set the globals `script` from the command line.

    arguments: the command line (default sys.argv[1:]). more: called with all settings, returns
    further keys with their defaults (a mechanism's options, which depend on the mechanism chosen).
    Returns (the script's settings, the further keys' values). Raises UserError for an unknown key
    or a value of another type.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    defaults = {key: value for key, value in script.items() if key.islower() and key[0] != "_" and type(value) in PLAIN}
    if "--help" in arguments or "-h" in arguments:
        print(f"{(script.get('__doc__') or '').strip()}\n\nsettings (--key=value) and their defaults:")
        print("\n".join(f"  {key} = {value!r}" for key, value in defaults.items()))
        sys.exit(0)
    assigned = []  # (key, value, where), in the order of the line
    for argument in arguments:
        if argument.startswith("--") and "=" in argument:
            key, value = argument[2:].split("=", 1)
            assigned.append((key, Text(value), f"--{key}"))
        elif argument.startswith("-"):
            raise UserError(f"expected --key=value or a config file, got {argument!r}")
        else:
            now = {**defaults, **{key: value for key, value, _ in assigned if not isinstance(value, Text)}}
            assigned += [(key, value, argument) for key, value in read(argument, now)]
    settings = dict(defaults)
    for key, value, where in assigned:
        if key in defaults:
            settings[key] = typed(key, value, defaults[key], where)
    further = more(settings) if more else {}
    options = dict(further)
    for key, value, where in assigned:
        if key in further:
            options[key] = typed(key, value, further[key], where)
        elif key not in defaults:
            raise UserError(f"{where}: unknown key {key}{nearest(key, [*defaults, *further])}")
    script.update(settings)
    return settings, options


class Text(str):
    """A value from the command line, not yet of its type."""


def read(path, names):
    """The assignments of a config file, [(key, value)], run with `names` at hand."""
    try:
        source = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path} ({error}); give a Python file or --key=value")
    space = {}
    try:
        exec(compile(source, str(path), "exec"), names, space)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}")
    skipped = (types.ModuleType, types.FunctionType, type)
    return [(key, value) for key, value in space.items() if key[0] != "_" and not isinstance(value, skipped)]


def typed(key, value, default, where):
    """`value` as the type of `default`; an int serves for a float."""
    expected = type(default)
    if isinstance(value, Text):
        if expected is str:
            return str(value)
        if expected is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise UserError(f"{where}: {key} expects {expected.__name__} (like {default!r}), got {type(value).__name__.lower()} {value!r}")
    return value
