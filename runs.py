"""A run as a folder: its log, made to survive crashes, and how to leave it in order."""

import json
import os
import shutil
import signal
import sys

from configurator import UserError


def prepare_folder(folder):
    """Make out_dir for a new run; an earlier run there is moved aside, not overwritten."""
    folder = folder.resolve()
    if (folder / "log.jsonl").exists():
        n = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{n}"))
        print(f"the earlier run in {folder.name} is now in {folder.name}.{n}")
    folder.mkdir(parents=True, exist_ok=True)


def mend_log(path, step):
    """Drop what a run resumed at `step` writes again, and a line cut by a crash."""
    kept = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            before = record["step"] < step or (record["step"] == step and record["split"] == "val")
            if before and not record.get("whole"):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            pass
    write_text(path, "".join(kept))


def write_whole(path, write):
    """Write a file that is at every moment whole, old or new: `write` gets it open for bytes."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not write {path}: {error.strerror}; what was there before is unchanged")


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


class Log:
    """log.jsonl, and the terminal: one line that rewrites itself, or plain lines in a file."""

    def __init__(self, folder, wandb):
        self.file, self.wandb, self.live = open(folder / "log.jsonl", "a", encoding="utf-8"), wandb, sys.stdout.isatty()

    def __call__(self, record, text, keep=False):
        """Log a record. `keep`: its text stays on the terminal; else the next one takes its place."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.wandb:
            named = {f"{record['split']}/{k}": v for k, v in record.items() if k not in ("split", "step")}
            self.wandb.summary.update(named) if "whole" in record else self.wandb.log(named, step=record["step"])
        width = shutil.get_terminal_size().columns - 1
        if not self.live:
            print(text, flush=True)
        else:
            print(f"\r{text:<{width}}" if keep else f"\r{text[:width]:<{width}}", end="\n" if keep else "", flush=True)


class Stop(Exception):
    """Ctrl-C or SIGTERM, raised where nothing is half done."""


asked = []  # signals that came


def leave_if_asked():
    if asked:
        raise Stop


def listen():
    """From now on the first SIGINT or SIGTERM is kept for `leave_if_asked`; a second one kills."""
    asked.clear()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: (asked.append(number), signal.signal(number, signal.SIG_DFL)))
