"""The layout: which file may import which, and how long each may be. `make check` prints the sizes."""

import ast
import graphlib

from helpers import ROOT

TOP = {path.stem: path for path in ROOT.glob("*.py")}
CORE = {f"core.{path.stem}": path for path in (ROOT / "core").glob("*.py") if path.stem != "__init__"}
LINES = {"model": 270, "train": 300, "attention": 250,
         **dict.fromkeys(("adaptive_attention_span", "sparse", "atrt", "alibi", "forgetting"), 150)}
SCRIPT, MACHINERY, TEST, WIDTH, README = 400, 300, 500, 120, 12 * 1024


def imports_of(path):
    """The repository's modules that a file imports, lazily or not: names like 'model' and 'core.ops'."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & (TOP.keys() | CORE.keys())


def test_core_imports_no_script_and_no_mechanism():
    wrong = {name: sorted(imports_of(path) & TOP.keys()) for name, path in CORE.items()}
    assert not {name: names for name, names in wrong.items() if names}


def test_imports_have_no_cycle():
    """Lazy imports count, too."""
    order = graphlib.TopologicalSorter({name: imports_of(path) for name, path in (TOP | CORE).items()})
    print("import order:", *order.static_order())  # raises CycleError


def test_files_are_short():
    """Each file within its budget of lines, and no line too wide."""
    tests = {str(path.relative_to(ROOT)): path for path in (ROOT / "tests").rglob("*.py")}
    budgets = {**{name: LINES.get(name, SCRIPT) for name in TOP}, **dict.fromkeys(CORE, MACHINERY),
               **dict.fromkeys(tests, TEST)}
    sizes = {name: path.read_text("utf-8").splitlines() for name, path in (TOP | CORE | tests).items()}
    for name, lines in sizes.items():
        if name not in tests:
            print(f"{name}: {len(lines)} of {budgets[name]} lines")
    print("in all, without tests:", sum(len(lines) for name, lines in sizes.items() if name not in tests))
    assert not {name: len(lines) for name, lines in sizes.items() if len(lines) > budgets[name]}
    assert not {f"{name}:{n}" for name, lines in sizes.items() for n, line in enumerate(lines, 1) if len(line) > WIDTH}


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= README
