"""The page in a browser: a server for it, and what tests click, write and read on it."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from helpers import ROOT


def environment(home):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "STREAMLIT_SERVER_HEADLESS": "true"}


@contextlib.contextmanager
def served(folder):
    """The page's address while a server runs in `folder`, started as its users start it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with open(folder / "server.txt", "w+") as said:
        command = [sys.executable, "-m", "streamlit", "run", ROOT / "app.py", f"--server.port={port}"]
        server = subprocess.Popen(command, cwd=folder, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                                  env=environment(folder))
        try:
            end = time.time() + 120
            while time.time() < end:
                with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
                    break
                assert server.poll() is None, Path(said.name).read_text()
                time.sleep(0.1)
            yield f"http://localhost:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    said = (folder / "server.txt").read_text()
    assert "Traceback" not in said and "Exception" not in said and "usage statistics" not in said, said


@contextlib.contextmanager
def opened(browser, address, width=1280, height=900):
    """A page that is open at `address`. At its end: no error on the console, nothing asked of any other machine, no
    traceback."""
    errors, elsewhere = [], []
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.set_default_timeout(60_000)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if re.match(rf"({address}|ws{address[4:]}|data:|blob:)", request.url)
            else elsewhere.append(request.url))
    page.goto(address)
    page.get_by_role("tab").first.wait_for()
    idle(page)
    yield page
    assert not errors and not elsewhere, (errors, elsewhere)
    assert page.get_by_test_id("stException").count() == 0 and "Traceback" not in page.content()
    page.close()


def idle(page):
    """Wait until what was asked for is shown."""
    page.wait_for_timeout(150)  # until the request is on its way
    page.wait_for_function("document.querySelector('[data-testid=stApp]').dataset.testScriptState == 'notRunning'")
    page.wait_for_timeout(150)


def until(page, what, expected, seconds=60):
    """`what()` is `expected`, now or when the page has caught up."""
    end = time.time() + seconds
    while (found := what()) != expected and time.time() < end:
        page.wait_for_timeout(100)
    assert found == expected


def part(page, name):
    page.get_by_role("tab", name=name).click()
    page.locator("[role=tabpanel]:visible [data-testid=stElementContainer]:visible").first.wait_for()
    idle(page)


def check_choice(page, label, option):
    """Pick an option of a selection box (exactly named), or one more of a box for several."""
    page.get_by_label(label).last.click()
    page.get_by_role("option", name=option, exact=True).click()
    idle(page)
    page.keyboard.press("Escape")


def write(page, label, text):
    """Put a text into a field, as by pasting it, and hand it in."""
    page.get_by_label(label, exact=True).fill(text)
    page.get_by_label(label, exact=True).press("Control+Enter")
    idle(page)


def metric(page, label, expected, n=0):
    """The n-th figure with this label becomes `expected`."""
    found = page.get_by_test_id("stMetric").filter(has_text=label).nth(n).get_by_test_id("stMetricValue")
    until(page, found.inner_text, expected)


def metrics(page, label):
    """All figures with this label, in the page's order."""
    found = page.get_by_test_id("stMetric").filter(has=page.get_by_text(label, exact=True))
    return found.get_by_test_id("stMetricValue").all_inner_texts()


def told(page, words):
    page.get_by_test_id("stAlert").filter(has_text=words).first.wait_for()


def shaded(page):
    """[(word, how dark)] of the first review."""
    found = page.locator(".shaded").first.locator("span").evaluate_all(
        "all => all.map(e => [e.textContent, getComputedStyle(e).backgroundColor])")
    return [(word, float((re.findall(r"[\d.]+", colour)[3:] or [1])[0]))
            for word, colour in found]  # rgba(r, g, b, alpha)


def is_blue(page):
    """Whether each word of the first review has the colour of those that oppose the answer."""
    return page.locator(".shaded").first.locator("span").evaluate_all(
        "all => all.map(e => getComputedStyle(e).backgroundColor.startsWith('rgba(40') || "
        "getComputedStyle(e).backgroundColor.startsWith('rgb(40'))")


def colours(picture):
    """How many colours a screenshot or one element has, each on 20 points or more."""
    points = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3)
    return (np.unique(points, axis=0, return_counts=True)[1] >= 20).sum()
