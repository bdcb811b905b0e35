"""Downloads that are checked and can be continued, and a line of progress."""

import os
import sys
import time

from core.config import UserError
from core.meta import mismatch

OR_LOCAL = "or give a local copy with --source"


class Progress:
    """A line on stderr that is rewritten on a terminal, and a line every few seconds elsewhere.

    label: what is being done; total: number of units, or None; unit: their name, or "B" for bytes.
    """

    def __init__(self, label, total=None, unit="B"):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.terminal = sys.stderr.isatty()
        self.start = self.last = time.monotonic()
        if not self.terminal:
            print(f"{label} ...", file=sys.stderr, flush=True)

    def add(self, n, seconds=0.2):
        """Count n more units as done. Print the line if the last one is `seconds` old (in a file: 25 times that)."""
        self.done += n
        now = time.monotonic()
        if now - self.last >= (seconds if self.terminal else 25 * seconds):
            self.last = now
            counts = [n for n in (self.done, self.total) if n is not None]
            counts = [f"{n / 1e6:,.1f}" if self.unit == "B" else f"{n:,}" for n in counts]
            unit = "MB" if self.unit == "B" else self.unit
            start, end = ("\r", "\x1b[K") if self.terminal else ("", "\n")
            line = f"{start}{self.label}: {' of '.join(counts)} {unit}, {now - self.start:.0f} s"
            print(line, end=end, file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.add(0, seconds=0)
        print(end="\n" if self.terminal else "", file=sys.stderr)


def download(url, path, size=None, digest=None, timeout=60):
    """Download `url` to `path` (Path) unless the right file is there already; returns the path.

    size: bytes, or None for what the server says. digest: "sha256:..." or "md5:...", or None. The file grows as
    NAME.part, which a later call continues (HTTP Range), and gets its name only if size and digest are right. Raises
    UserError for everything that goes wrong.
    """
    if path.is_file():
        if (wrong := mismatch(path, size, digest)) is None:
            return path
        print(f"{path.name} is there but is not the published file ({wrong}): downloading it again", file=sys.stderr)
        path.unlink()
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.is_file() else 0
    if not start or start != size:
        size = fetch(url, part, start, size, timeout)
    if (wrong := mismatch(part, size, digest)) is not None:
        part.unlink()
        raise UserError(f"{url}: {wrong}; the file was removed: run again to start over, {OR_LOCAL}")
    os.replace(part, path)
    return path


def fetch(url, part, start, size, timeout):
    """Append to `part`, which has `start` bytes, what is missing of `url`. Returns the size of the whole in bytes."""
    import requests

    if size is not None and start > size:
        start = 0
    # identity: compression on the way would change the meaning of sizes and ranges
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code == 416:  # the part is as long as the file, or longer: the digest decides
                return size
            if response.status_code not in (200, 206):
                raise UserError(f"{url}: the server answered {response.status_code} {response.reason}: try later, "
                                f"{OR_LOCAL}")
            content_range = response.headers.get("Content-Range", "no Content-Range")
            if response.status_code == 200:
                start = 0  # the server does not continue downloads
            elif not content_range.startswith(f"bytes {start}-"):
                raise UserError(f"{url}: asked for the bytes from {start:,}, the server sent {content_range!r}: "
                                f"remove {part.name} and run again, {OR_LOCAL}")
            if size is None and "Content-Length" in response.headers:
                size = start + int(response.headers["Content-Length"])
            label, mode = f"downloading {part.name.removesuffix('.part')}", "ab" if start else "wb"
            with Progress(label, size) as progress, open(part, mode) as file:
                progress.done = start
                for piece in response.iter_content(1 << 13):  # small: the last piece is lost if the download breaks off
                    file.write(piece)
                    progress.add(len(piece))
                    if size is not None and progress.done > size:
                        break  # longer than published: the check of the size reports it
    except requests.RequestException as error:
        written = part.stat().st_size if part.is_file() else 0
        when = f"after {written:,} bytes" if written else "before the first byte"
        raise UserError(f"{url}: the download broke off {when} ({type(error).__name__}): run again to go on, "
                        f"{OR_LOCAL}") from error
    except OSError as error:  # of the disk; those of the network are RequestExceptions
        raise UserError(f"could not write {part}: {error.strerror}; run again to go on, {OR_LOCAL}") from error
    return size
