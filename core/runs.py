"""A run as a folder: one process holds it, its files are at every moment whole, and how to leave it in order."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import deque

from core.config import UserError, short_repr

try:
    import fcntl
except ImportError:  # Windows: there nothing guards a folder against a second run
    fcntl = None


class SaveError(UserError):
    """Something could not be written; what was there before is unchanged."""


@contextlib.contextmanager
def locked(folder):
    """Hold out_dir, which is made where it is missing, for this process alone: another one is refused with UserError.

    The system takes the lock back when the process ends, however it ends; the file `lock` that stays means nothing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+b", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; give another --out_dir, or see to the rights to this one")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(20).decode("ascii", "replace")
            raise UserError(f"{folder} is in use by another run (process {owner or 'unknown'}); wait for its end or stop it, "
                            "or give another --out_dir")
        except OSError:
            pass  # a file system without locks, as some network drives are
        with contextlib.suppress(OSError):  # for people alone
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


EARLIER = "earlier.part"  # an earlier run's files on their way out of a folder
RUN_FILE = re.compile(  # what train.py, plot.py and compare.py write into a run's folder, whole or half written
    r"(config\.json|log\.jsonl|result\.json|(ckpt|ckpt-previous|best)\.pt|predictions-(train|val|test)\.npz"
    r"|(curves|kept|confusion|roc)\.png|(spans|heat|reviews)(-.+)?\.png)(\.part)?|(ckpt|best)-\d+\.shards")


def check_folder(folder):
    """Raise UserError, before anything is touched, where out_dir holds anything but a run's files: a new run would be mixed
    with it, and the next one would not know what to move aside."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name not in ("lock", EARLIER) and not RUN_FILE.fullmatch(name):
            raise UserError(f"{folder} holds {short_repr(name)}, which is no file of a run of train.py: give another --out_dir, or "
                            "move it away")


def prepare_folder(folder):
    """Clear out_dir, which is locked, for a new run: an earlier run's files are moved aside, not overwritten, and no others.

    Killed half way, the next call moves the rest to the same place.
    """
    folder = folder.resolve()
    earlier, names = folder / EARLIER, [path.name for path in folder.iterdir() if RUN_FILE.fullmatch(path.name)]
    if not earlier.exists() and all(name.endswith(".part") for name in names):
        return
    earlier.mkdir(exist_ok=True)
    for name in names:
        os.rename(folder / name, earlier / name)
    n = next(n for n in range(1, 10**6) if not os.path.lexists(folder.with_name(f"{folder.name}.{n}")))
    os.rename(earlier, folder.with_name(f"{folder.name}.{n}"))
    print(f"the earlier run in {folder.name} is now in {folder.name}.{n}")


def mend_log(path, step, evaluated):
    """Drop what a run resumed at `step` writes again, and a line cut by a crash. evaluated: the step last evaluated."""
    kept = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            before = record["step"] < step or (record["step"] == step == evaluated and record["split"] == "val")
            if before and not record.get("whole"):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
    write_text(path, "".join(kept))


def write_whole(path, write, keep=None):
    """Write a file that is at every moment whole, old or new: `write` gets it open for bytes.

    keep: a name beside it under which the old file stays, where the file system knows hard links.
    Raises SaveError where the system refuses.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            keep_as(path, path.with_name(keep))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides what the system said
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SaveError(f"could not write {path}: {cause.strerror}; what was there before is unchanged")


def keep_as(path, name):
    """Let the file `path` have the other name, too; nothing where that cannot be."""
    link = name.with_name(name.name + ".part")
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, name)
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)  # it stays where both were names of one file already


def digest(file, size=None):
    """The sha256 of a file that is open for bytes, or of its first `size` bytes, in hexadecimal."""
    found, left = hashlib.sha256(), file.seek(0, os.SEEK_END) if size is None else size
    file.seek(0)
    while left and (piece := file.read(min(left, 1 << 20))):
        found.update(piece)
        left -= len(piece)
    return found.hexdigest()


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def start_wandb(project, name, settings):
    """wandb, with a run begun. Raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log=True needs the package wandb: pip install wandb")
    wandb.init(project=project, name=name, config=settings)
    return wandb


class Log:
    """log.jsonl, and the terminal: one line that rewrites itself, or plain lines in a file."""

    def __init__(self, folder, wandb):
        self.path, self.wandb, self.live = folder / "log.jsonl", wandb, sys.stdout.isatty()
        self.waiting = b""  # what could not be written yet

    def __call__(self, record, text, keep=False):
        """Log a record. `keep`: its text stays on the terminal; else the next one takes its place."""
        if self.wandb:
            named = {f"{record['split']}/{k}": v for k, v in record.items() if k not in ("split", "step")}
            self.wandb.summary.update(named) if "whole" in record else self.wandb.log(named, step=record["step"])
        width = shutil.get_terminal_size().columns - 1
        if not self.live:
            self.say(text)
        else:
            self.say(f"\r{text:<{width}}" if keep else f"\r{text[:width]:<{width}}", end="\n" if keep else "")
        self.waiting += json.dumps(record).encode() + b"\n"
        self.flush()

    def say(self, text, end="\n"):
        """Print; into a file on a full disk nothing, which is no reason to stop."""
        try:
            print(text, end=end, flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def flush(self, sync=False):
        """Write what waits, whole or not at all; sync: onto the disk itself. Raises SaveError where the system refuses;
        it waits on then."""
        end = None
        try:
            with open(self.path, "ab", buffering=0) as file:
                end, rest = file.tell(), self.waiting
                while rest:
                    rest = rest[file.write(rest) :]
                if sync:
                    os.fsync(file.fileno())
            self.waiting = b""
        except OSError as error:
            with contextlib.suppress(OSError):
                if end is not None:
                    os.truncate(self.path, end)  # half a line would spoil the next one
            raise SaveError(f"could not write {self.path}: {error.strerror}; what was there before is unchanged")


# ---- words for the terminal -------------------------------------------------------------------


def say(result):
    """Scores in words."""
    units = {"loss": "{:.4f} nats", "bits_per_byte": "{:.4f}"}
    return ", ".join(f"{name.replace('_', ' ')} {units.get(name, '{:.4f}').format(value)}" for name, value in result.items())


def format_stats(stats):
    """The mean over layers and heads of each of the mechanisms' numbers, in words that go on after the scores."""
    found = {}
    for layer in stats:
        for name, value in layer.items():
            values = value if isinstance(value, list) else [value]
            found.setdefault(name, []).extend(x for x in values if isinstance(x, (int, float)))
    means = {name.replace("_", " "): sum(values) / len(values) for name, values in found.items() if values}
    return "".join(f", {name} {mean:,.0f}" if abs(mean) >= 100 else f", {name} {mean:.3g}" for name, mean in means.items())


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


# ---- how to leave -----------------------------------------------------------------------------


class Stop(Exception):
    """Ctrl-C or SIGTERM, raised where nothing is half done."""


asked = deque()  # signals that came; no list, which would be a setting of the scripts that import it


def install_signal_handlers():
    """From now on the first SIGINT or SIGTERM is kept for `dist.leave_if_asked`; a second one kills."""
    asked.clear()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: (asked.append(number), signal.signal(number, signal.SIG_DFL)))
