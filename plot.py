"""Pictures: python plot.py OUT_DIR [OUT_DIR ...] [--key=value], or python plot.py results/FILE.json

OUT_DIR   a run of train.py; several runs share each picture. In the first one's folder, or in --out=FOLDER:
    curves.png      loss, bits per byte and accuracy, over the steps
    kept.png        the share of pairs that attention keeps, if it drops some
    spans.png       the spans and periods that heads have learned
    confusion.png   a classifier's predictions against the truth, roc.png, and lengths.png, its accuracy by length of
                    text: over the test split if it was opened, else over validation
  or instead, with a text, from best.pt:
    --text="..."      heat.png: attention within a prompt or a review, in --layer=N by --head=N; and for a classifier
                      reviews.png: its answer, and the words that support or oppose it (--explain=attention: the words
                      that receive attention)
    --reviews=FILE    reviews.png for a file of lines {"text": "...", "label": 1, "kind": "..."}; label, kind optional
FILE      results of compare.py (FILE.png, FILE_hard.png, FILE_recall.png), or of `bench.py attention --results=FILE`
          (FILE.png)

`python attention.py NAME` draws a mechanism's pattern. Pictures need matplotlib.
"""

from core import startup  # first: torch reads its settings when it is loaded

import sys
from pathlib import Path

from core import curves, figures
from core.config import UserError, configure, run_main

out = ""  # the folder for pictures; default: that of the first run, or of the JSON file
dpi = 110  # dots per inch
text = ""  # a text to draw the attention and, for a classifier, the answer of
reviews = ""  # a file of reviews to draw a classifier's answers of
explain = "occlusion"  # what shades words: the answer's change without them, or the 'attention' that they receive
layer = -1  # of heat maps; -1: the last one
head = -1  # of heat maps; -1: all heads of the layer


def unique_names(folders):
    """{name: folder} of different folders: of each path the shortest end that differs from the others' ends."""
    folders = {folder.resolve(): folder for folder in folders}
    depth = 1
    while len({path.parts[-depth:] for path in folders}) < len(folders):
        depth += 1
    return {"/".join(path.parts[-depth:]): folder for path, folder in folders.items()}


def check(paths, folders):
    """Raise UserError for a path or a setting of which no picture can be drawn."""
    if not 20 <= dpi <= 1000:
        raise UserError(f"dpi must be from 20 to 1000, got {dpi}")
    for path in paths:
        if not (path.is_dir() or path.exists() and path.suffix == ".json"):
            raise UserError(f"expected the folder of a run, or a JSON file of compare.py or bench.py, got {path}"
                            f"{', which does not exist' * (not path.exists())}: python plot.py OUT_DIR")
    needs_folder = bool(text or reviews)
    if not paths or needs_folder and not folders:
        file = ", or a JSON file of compare.py or bench.py" * (not needs_folder)
        raise UserError(f"expected the folder of a run{file}, got {', '.join(map(str, paths)) or 'nothing'}: "
                        "python plot.py OUT_DIR")
    if (layer, head) != (-1, -1) and not text:
        raise UserError('layer and head choose among the heat maps of a text: give --text="..."')


def main():
    arguments = sys.argv[1:]
    paths = [Path(name) for name in arguments if name[:1] != "-"]
    configure(globals(), [argument for argument in arguments if argument[:1] == "-"])
    folders = [path for path in paths if path.is_dir()]
    check(paths, folders)
    figures.set_dpi(dpi)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path not in folders:
            from core import charts

            charts.draw(path, Path(out or path.parent))
    runs = unique_names(folders)
    if text or reviews:
        import sample  # here, as it imports torch
        from core import heat

        loaded = {name: sample.read_run(folder / "best.pt") for name, folder in runs.items()}
        heat.draw_texts(loaded, Path(out or folders[0]), text, reviews, explain, layer, head)
    elif runs:
        curves.draw_runs(runs, Path(out or folders[0]))


if __name__ == "__main__":
    run_main(main)
