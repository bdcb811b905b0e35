"""README.md and docs/: size, links, paths, make targets, and the flags of the commands that they show."""

import re
from pathlib import Path

import pytest

from core.config import ALIASES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# log.md is dated history: it may name what has been deleted.
CURRENT = [page for page in PAGES if page.name != "log.md"]
# Files of a run, a data set or a user, in any folder.
WRITTEN = {"config.json", "log.jsonl", "ckpt.pt", "ckpt-previous.pt", "best.pt", "meta.json", "train.bin", "val.bin",
           "test.bin", "results.jsonl", "result.json", "prepare.py", "reviews.txt", "enwik8.zip", "book.txt",
           "mails.jsonl"}
PATH = re.compile(r"[\w./-]+\.(?:py|md|jsonl?|txt|png)|(?:config|core|data|docs|results|tests)/[\w./-]*")
PLACEHOLDER = re.compile(r"NAME|FOLDER|OUT_DIR|\bx\.py|\bmy_\w+\.py|^out")
COMMAND = re.compile(r"(?<![\w/])((?:data/\w+/)?\w+)\.py((?:[^\n`]|\\\n)*)")


def text_of(page):
    """The page with commands that continue after a backslash on one line."""
    return page.read_text("utf-8").replace("\\\n", " ")


def commands_of(page):
    """Lines of the shell blocks, and every span in backticks, which may go over a line's end."""
    text = text_of(page)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [line.split(" #")[0] for block in blocks for line in block.splitlines()] + spans


def assigned(file):
    """Names that a file assigns at its top level."""
    return set(re.findall(r"^([a-z]\w*) = ", file.read_text("utf-8"), re.MULTILINE))


def settings(script):
    """Flags that a script accepts: its top-level names; train.py, bench.py and attention.py take those of mechanisms
    too."""
    file = ROOT / f"{script}.py"
    if script.startswith("data/"):
        files = file, ROOT / "core" / "prepare.py"
        return {flag for path in files for flag in re.findall(r"\"--([\w-]+)\"", path.read_text("utf-8"))}
    names = assigned(file)
    if script == "bench":
        names |= assigned(ROOT / "bench_load.py")
    if script in ("train", "bench", "attention"):
        mechanisms = [path for path in ROOT.glob("*.py") if "\nclass Attention(" in path.read_text("utf-8")]
        names |= set(ALIASES).union(*map(assigned, [*mechanisms, ROOT / "bilstm.py"]))
    if script == "attention":  # which also takes the sizes that core/pattern.py draws with
        names |= {"T", "n_layer", "n_head", "causal", "out"}
    return names


def test_readme_is_at_most_12_kilobytes():
    assert len((ROOT / "README.md").read_bytes()) <= 12_288


def test_readme_links_to_every_page():
    links = re.findall(r"\]\((docs/\w+\.md)\)", text_of(ROOT / "README.md"))
    assert {ROOT / link for link in links} == set(PAGES) - {ROOT / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]
    assert [link for link in links if not (page.parent / link.split("#")[0]).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_paths_exist(page):
    words = {word.strip("'\"") for command in commands_of(page)
             for word in re.split(r"[\s=]", re.sub(r"--(results|out)=\S+", "", command))}
    paths = {word for word in words if PATH.fullmatch(word) and not PLACEHOLDER.search(word)} - WRITTEN
    pictures = {path for path in paths if path.endswith(".png") and "/" not in path}  # plot.py writes them
    assert sorted(path for path in paths - pictures if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {name for command in commands_of(page) for name in re.findall(r"^make ([\w-]+)", command)} <= targets


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_flags_of_commands_exist(page):
    unknown = []
    for command in commands_of(page):
        for script, arguments in COMMAND.findall(command):
            if (ROOT / f"{script}.py").exists():
                flags = set(re.findall(r"--([\w-]+)", arguments)) - {"key", "help"}
                unknown += [f"{script}.py --{flag}" for flag in sorted(flags - settings(script))]
    assert unknown == []


def test_the_checks_find_faults(tmp_path):
    """A page with a wrong link, path, target and flag fails each check."""
    page = tmp_path / "page.md"
    command = "python train.py config/none.py \\\n  --none=1"
    page.write_text(f"[x](none.md) `core/none.py` `make none`\n```sh\n{command}\n```\n", "utf-8")
    for check in (test_relative_links_resolve, test_paths_exist, test_make_targets_exist, test_flags_of_commands_exist):
        with pytest.raises(AssertionError):
            check(page)
