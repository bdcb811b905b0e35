"""The folder of a run: its lock, files that are replaced atomically, its log; and the signals that stop a run."""

import contextlib
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
except ImportError:  # Windows: folders are not locked
    fcntl = None


class SaveError(UserError):
    """A file could not be written; the previous file is intact."""


def save_error(path, reason):
    return SaveError(f"could not write {path}: {reason}; the previous file is intact")


@contextlib.contextmanager
def locked(folder):
    """Lock out_dir, which is created if it is missing, for this process. Raises UserError if another process holds it.

    The system releases the lock when the process ends, however it ends. The file `lock` that remains has no meaning.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+b", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; give another --out_dir, or change the "
                        "permissions of this one")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(20).decode("ascii", "replace")
            raise UserError(f"{folder} is in use by another run (process {owner or 'unknown'}); wait for its end or "
                            "stop it, or give another --out_dir")
        except OSError:
            pass  # a file system without locks, as some network drives are
        with contextlib.suppress(OSError):  # for the message above
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


EARLIER = "earlier.part"  # holds an earlier run's files while they are moved out of a folder
RUN_FILE = re.compile(  # what train.py, plot.py and compare.py write into a run's folder, whole or half written
    r"(config\.json|log\.jsonl|result\.json|(ckpt|ckpt-previous|best)\.pt|predictions-(train|val|test)\.npz"
    r"|(curves|kept|confusion|roc|lengths)\.png|(spans|heat|reviews)(-.+)?\.png)(\.part)?|(ckpt|best)-\d+\.shards")


def check_folder(folder):
    """Raise UserError, before anything is changed, if out_dir holds anything but a run's files."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name not in ("lock", EARLIER) and not RUN_FILE.fullmatch(name):
            raise UserError(f"{folder} holds {short_repr(name)}, which is no file of a run of train.py: give "
                            "another --out_dir, or "
                            "move it away")


def prepare_folder(folder):
    """Move an earlier run's files, and no others, out of out_dir, which is locked.

    If the process is killed half way, the next call moves the rest to the same place.
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
    """Drop the records that a run resumed at `step` writes again, and damaged lines. evaluated: the last evaluated
    step."""
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
    """Write a file atomically: `write` gets it open for bytes, under another name.

    keep: a name beside it under which the old file stays, if the file system has hard links. Raises SaveError.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link_as(path, path.with_name(keep))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own error
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise save_error(path, cause.strerror)


def link_as(path, name):
    """Give the file `path` another name, too, if the file system has hard links."""
    link = name.with_name(name.name + ".part")
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, name)
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)  # it remains if both were names of one file already


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def start_wandb(project, name, settings):
    """The module wandb, with a run started. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log=True needs the package wandb: pip install wandb")
    wandb.init(project=project, name=name, config=settings)
    return wandb


class Log:
    """Writes log.jsonl and prints: on a terminal a line that is overwritten, else plain lines."""

    def __init__(self, folder, wandb):
        self.path, self.wandb, self.live = folder / "log.jsonl", wandb, sys.stdout.isatty()
        self.waiting = b""  # records that could not be written yet

    def __call__(self, record, text, keep=False):
        """Log a record and print `text`. keep: the text stays on the terminal; else the next one overwrites it."""
        if self.wandb:
            named = {f"{record['split']}/{k}": v for k, v in record.items() if k not in ("split", "step")}
            self.wandb.summary.update(named) if "whole" in record else self.wandb.log(named, step=record["step"])
        width = shutil.get_terminal_size().columns - 1
        if not self.live:
            self.print(text)
        else:
            self.print(f"\r{text:<{width}}" if keep else f"\r{text[:width]:<{width}}", end="\n" if keep else "")
        self.waiting += json.dumps(record).encode() + b"\n"
        self.flush()

    def print(self, text, end="\n"):
        """Print. Output that goes to a file on a full disk is lost, which does not stop the run."""
        try:
            print(text, end=end, flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def flush(self, sync=False):
        """Write the waiting records, all or none; sync: onto the disk itself. Raises SaveError; they wait on then."""
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
                    os.truncate(self.path, end)  # half a line would damage the next one
            raise save_error(self.path, error.strerror)


# ---- text for the terminal --------------------------------------------------------------------


def format_scores(scores):
    """{name: value} as text: 'loss 1.2345 nats, bits per byte 1.7810'. Lists are left out."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}{' nats' * (name == 'loss')}"
                     for name, value in scores.items() if not isinstance(value, list))


def format_lengths(scores):
    """The accuracy by length of text among the scores as text to append to them; '' if it is missing."""
    groups = [f"{accuracy:.4f} ({a}-{b})" for a, b, _, accuracy in scores.get("accuracy_by_length", [])]
    return f"; accuracy by length in tokens: {', '.join(groups)}" if groups else ""


def format_stats(stats):
    """The mean over layers and heads of each of the mechanisms' statistics as text to append to the scores.

    stats: a dict for each layer, of numbers, lists of numbers, and other values, which are ignored.
    """
    numbers = {}
    for layer in stats:
        for name, value in layer.items():
            values = value if isinstance(value, list) else [value]
            numbers.setdefault(name, []).extend(x for x in values if isinstance(x, (int, float)))
    means = {name.replace("_", " "): sum(values) / len(values) for name, values in numbers.items() if values}
    return "".join(f", {name} {mean:,.0f}" if abs(mean) >= 100 else f", {name} {mean:.3g}"
                   for name, mean in means.items())


def clock(seconds):
    """Seconds as text: 1:05, or 1:00:05."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


# ---- signals ----------------------------------------------------------------------------------


class Stop(Exception):
    """SIGINT or SIGTERM arrived; raised at points where the run can be saved."""


asked = deque()  # signals that arrived; no list, which would be a setting of the scripts that import it


def install_signal_handlers():
    """Record the first SIGINT or SIGTERM for `dist.leave_if_asked`; a second one ends the process."""
    asked.clear()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: (asked.append(number), signal.signal(number, signal.SIG_DFL)))
