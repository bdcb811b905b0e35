"""Downloads from a server made here: checked, continued, refused."""

import hashlib
import importlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sources import load

from core.config import UserError
from core.download import download

enwik8 = importlib.import_module("data.enwik8.prepare")

BODY = bytes(range(256)) * 4000
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """/file resumes; /plain does not; /cut breaks off; /broken is an error; /other sends something else."""

    asked = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        Server.asked.append((self.path, wanted))
        if self.path == "/broken":
            self.send_error(503)
            return
        body = b"<html>sign in</html>" if self.path == "/other" else BODY
        start = int(wanted[6:-1]) if wanted and self.path != "/plain" else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            sent = start + 1 if self.path == "/shifted" else start
            self.send_header("Content-Range", f"bytes {sent}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : len(body) // 2] if self.path == "/cut" else body[start:])

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    Server.asked.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("digest", [DIGEST, "md5:" + hashlib.md5(BODY).hexdigest()])
def test_download(server, tmp_path, size, digest):
    path = tmp_path / "a.zip"
    assert download(f"{server}/file", path, size, digest) == path
    assert path.read_bytes() == BODY and [f.name for f in tmp_path.iterdir()] == ["a.zip"]
    download(f"{server}/file", path, size, digest)
    assert Server.asked == [("/file", None)]  # the second time it was there


@pytest.mark.parametrize("where, ranges", [
    ("/file", ["bytes=1000-"]), ("/plain", ["bytes=1000-"]),
], ids=["resumes", "server-does-not"])
def test_download_goes_on(server, tmp_path, where, ranges):
    (tmp_path / "a.part").write_bytes(BODY[:1000])
    download(server + where, tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and [r for _, r in Server.asked] == ranges
    assert not (tmp_path / "a.part").exists()


def test_download_breaks_off_and_goes_on(server, tmp_path):
    with pytest.raises(UserError, match="broke off after 5..,... bytes .*run again to go on.*--source"):
        download(f"{server}/cut", tmp_path / "a", len(BODY), DIGEST)
    assert [f.name for f in tmp_path.iterdir()] == ["a.part"]
    have = (tmp_path / "a.part").stat().st_size
    assert have > 500_000
    download(f"{server}/file", tmp_path / "a", None, DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and Server.asked[-1] == ("/file", f"bytes={have}-")


def test_download_of_a_part_that_is_whole(server, tmp_path):
    for size, asked in ((len(BODY), []), (None, [("/file", f"bytes={len(BODY)}-")])):
        Server.asked.clear()
        (tmp_path / "a.part").write_bytes(BODY)
        download(f"{server}/file", tmp_path / "a", size, DIGEST)
        assert (tmp_path / "a").read_bytes() == BODY and Server.asked == asked
        (tmp_path / "a").unlink()


@pytest.mark.parametrize("part", [b"wrong" * 100, BODY + b"too long"], ids=["wrong", "too long"])
def test_download_of_a_wrong_part(server, tmp_path, part):
    (tmp_path / "a.part").write_bytes(part)
    try:
        download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    except UserError as error:  # its beginning was wrong: seen at the end, thrown away, right the next time
        assert "expected sha256" in str(error) and "run again" in str(error) and not list(tmp_path.iterdir())
        download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY


@pytest.mark.parametrize("where, size, digest, message", [
    ("/other", None, DIGEST, "expected sha256 .*, got "),
    ("/other", len(BODY), DIGEST, r"expected 1,024,000 bytes, got 20"),
    ("/file", 1000, None, r"expected 1,000 bytes, got "),
    ("/broken", None, DIGEST, "answered 503 .*try later.*--source"),
], ids="digest size too-long error".split())
def test_download_refused(server, tmp_path, where, size, digest, message):
    with pytest.raises(UserError, match=message):
        download(server + where, tmp_path / "a", size, digest)
    assert not list(tmp_path.iterdir())


def test_download_of_another_range(server, tmp_path):
    (tmp_path / "a.part").write_bytes(BODY[:1000])
    with pytest.raises(UserError, match="asked for the bytes from 1,000, the server sent 'bytes 1001-"):
        download(f"{server}/shifted", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a.part").read_bytes() == BODY[:1000]


def test_download_without_a_server(tmp_path):
    with pytest.raises(UserError, match="broke off before the first byte .*ConnectionError"):
        download("http://127.0.0.1:9/x", tmp_path / "a", 10, DIGEST)
    assert not list(tmp_path.iterdir())


def test_download_onto_a_full_disk(server, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = "could not write .*a.part: File too large; run again to go on, or give a local copy"
        with pytest.raises(UserError, match=message):
            download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and Server.asked[-1] == ("/file", "bytes=100000-")


def test_download_replaces_a_wrong_file(server, tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"from elsewhere")
    download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and "expected 1,024,000 bytes, got 14" in capsys.readouterr().err


def test_a_script_downloads_checks_and_prepares(server, tmp_path, monkeypatch):
    monkeypatch.setattr(enwik8, "URL", f"{server}/file")
    monkeypatch.setattr(enwik8, "HERE", tmp_path)
    monkeypatch.setattr(enwik8, "SIZE", len(BODY))
    monkeypatch.setattr(enwik8, "DIGEST", DIGEST)
    monkeypatch.setattr(enwik8, "BYTES", len(BODY))
    enwik8.main(["--out_dir", str(tmp_path / "out")])
    meta, arrays = load(tmp_path / "out")
    assert meta["partial"] is False and meta["source"]["file"] == "enwik8.zip" and meta["source"]["bytes"] == len(BODY)
    assert arrays["train"].tobytes() == BODY[: len(BODY) * 90 // 100]
