"""Comparisons in numbers and words: what the results of several seeds show, and the table of it."""

from collections import Counter

import numpy as np

from core.stats import LEVEL, chance, holm, interval, mcnemar, standard_error

# 1: more is better
SCORES = {"bits_per_byte": -1, "accuracy": 1, "f1": 1, "precision": 1, "recall": 1, "auc": 1, "loss": -1}


def main_score(scores):
    """The name of the score that a comparison judges: of classifiers and of recall the accuracy, else bits per byte or
    the loss. scores: a dict with the scores, and for recall `accuracy_by_distance`."""
    by_accuracy = {"auc", "accuracy_by_distance"} & scores.keys()
    return next(name for name in SCORES if name in scores and (name != "accuracy" or by_accuracy))


def difference_from(first, runs, score, right_answers, resamples):
    """How the results of one variant differ from those of the first, seed by seed: mean, interval, p, and for
    classifiers McNemar's exact test of each pair of models.

    right_answers: of classifiers, a function of a result: whether each text is classified correctly, (N,); else None.
    resamples: of the bootstrap.
    """
    pairs = list(zip(first, runs))
    means = np.array([b["scores"][score] - a["scores"][score] for a, b in pairs])
    tests, difference = {}, means
    if right_answers:
        right = np.array([[right_answers(result) for result in pair] for pair in pairs])  # (seeds, 2, texts)
        difference = right[:, 1].astype(np.float32) - right[:, 0]
        only = [[int((a & ~b).sum()), int((b & ~a).sum())] for a, b in right]
        tests["mcnemar"] = [{"only_first": a, "only_this": b, "p": mcnemar(a, b)} for a, b in only]
    error = standard_error(difference, np.random.default_rng(0), resamples)
    mean = float(means.mean())
    p = chance(mean / error, len(pairs) - 1) if error > 0 else float(mean == 0)
    return {**interval(mean, error, len(pairs)), "p": p, **tests}


def summarize(results, costs, right_answers, resamples):
    """The comparison's rows, one for each variant, from the results of its runs, {name: [result, ...]}, and what a step
    of each costs. right_answers, resamples: see `difference_from`."""
    rows, first = [], next(iter(results.values()))
    kind, score = "classify" if "auc" in first[0]["scores"] else "lm", main_score({**first[0], **first[0]["scores"]})
    for name, runs in results.items():
        mean = lambda key: None if runs[0][key] is None else float(np.mean([r[key] for r in runs]))  # noqa: E731
        row = {"variant": name, "parameters": costs[name]["parameters"], "steps": runs[0]["steps"],
               "seconds_per_step": costs[name]["seconds_per_step"],
               "minutes": runs[0]["steps"] * costs[name]["seconds_per_step"] / 60, "work": mean("work"),
               "kept_share": mean("kept_share"), "scores": {}, "difference": None}
        for s in [s for s in runs[0]["scores"] if all(s in r["scores"] for r in runs)]:  # earlier runs lack some
            values = np.array([r["scores"][s] for r in runs])
            row["scores"][s] = interval(values.mean(), standard_error(values), len(runs))
        if "train_curve" in runs[0]:
            row["train_first"], row["train_last"] = (float(np.mean([r["train_curve"][n][1] for r in runs]))
                                                     for n in (1, -1))
            row["spread"] = float(np.mean([np.std([v for _, v in r["curve"][1:]], ddof=1) for r in runs]))
        if "hard" in runs[0]:
            row["hard"] = {kind: float(np.mean([r["hard"][kind] for r in runs])) for kind in runs[0]["hard"]}
        if "next" in runs[0]:
            row["next"] = {prompt: Counter(r["next"][prompt][0] for r in runs).most_common(1)[0]
                           for prompt in runs[0]["next"]}
        if "accuracy_by_distance" in runs[0]:
            distances, values = zip(*(zip(*r["accuracy_by_distance"]) for r in runs))
            row["accuracy_by_distance"] = [list(p) for p in zip(distances[0], np.mean(values, 0).tolist())]
        if runs is not first:
            right = right_answers if kind == "classify" else None
            row["difference"] = difference_from(first, runs, score, right, resamples)
        rows.append(row)
    others = [row["difference"] for row in rows[1:]]
    for difference, p in zip(others, holm([d["p"] for d in others])):
        better = difference["mean"] * SCORES[score] > 0
        difference |= {"p_holm": p, "verdict": "no difference shown" if p >= LEVEL else "better" if better else "worse"}
    return {"kind": kind, "score": score, "split": first[0]["split"], "variants": rows}


# ---- the table ---------------------------------------------------------------------------------


def table(summary):
    """The comparison as Markdown, all that a reader needs beside the figures included."""
    return "\n".join([description(summary), *verdicts(summary), *further_tables(summary)]) + "\n"


def show(x, score, sign=""):
    """A score as text: an accuracy in percent."""
    return f"{100 * x:{sign}.1f}" if score == "accuracy" else f"{x:{sign}.3f}"


def show_interval(x, score, sign=""):
    low, mean, high = (show(x[key], score, sign) for key in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]"


def markdown(head, body):
    """The lines of a Markdown table, after an empty one."""
    rows = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *body)]
    return ["", rows[0], "|---" * len(head) + "|", *rows[1:]]


def score_name(score):
    return score.replace("_", " ") + " (%)" * (score == "accuracy")


def description(summary):
    """What was compared on what, in sentences."""
    machine, contexts = summary["machine"], {row["block_size"] for row in summary["variants"]}
    context = f"a context of {min(contexts)} tokens"
    if len(contexts) > 1:
        context = "contexts of different lengths, which are part of the score"
    amount = f"{summary['amount']:,g}" + " x 1e12 operations" * (summary["budget"] == "work")
    return (f"**{summary['title']}.** {len(summary['seeds'])} seeds; every run gets the same {summary['budget']}, "
            f"{amount}, of {summary['dataset']}; {score_name(summary['score'])} of the {summary['split']} split, "
            f"{context}, with the weights that did best on validation. {machine['gpu'] or machine['processor']}, "
            f"{machine['threads']} threads, torch {machine['torch']}, products in {summary['dtype']}. In brackets 95 % "
            f"intervals; p after Holm. `{summary['command']}`")


def verdicts(summary):
    """The table of scores, differences and costs."""
    score, rows, is_classifier = summary["score"], summary["variants"], summary["kind"] == "classify"
    differ = len({row["block_size"] for row in rows}) > 1
    head = ["variant", score_name(score), f"against {rows[0]['variant']}", "p", "verdict"]
    head += ["McNemar: seeds better / worse"] * is_classifier + ["context"] * differ
    head += ["steps", "minutes", "work (TFLOP)", "kept share", "parameters"]
    body = []
    for row in rows:
        d, cells = row["difference"], [row["variant"], show_interval(row["scores"][score], score)]
        cells += [show_interval(d, score, "+"), f"{d['p_holm']:.3f}", d["verdict"]] if d else ["", "", ""]
        if is_classifier:
            tests = [test for test in (d or {}).get("mcnemar", []) if test["p"] < LEVEL]
            shown = [test["only_this"] - test["only_first"] for test in tests]
            cells.append(f"{sum(x > 0 for x in shown)} / {sum(x < 0 for x in shown)}" if d else "")
        cells += [f"{row['block_size']:,}"] * differ
        cells += [f"{row['steps']:,}", f"{row['minutes']:.1f}", f"{row['work'] / 1e12:,.1f}"]
        cells += ["" if row["kept_share"] is None else f"{row['kept_share']:.0%}", f"{row['parameters']:,}"]
        body.append(cells)
    return markdown(head, body)


def further_tables(summary):
    """The tables of what only some comparisons have."""
    score, rows, lines = summary["score"], summary["variants"], []
    if summary["kind"] == "classify":
        names = [s for s in rows[0]["scores"] if s not in (score, "loss")]
        lines += markdown(["variant", *names],
                          [[row["variant"], *(show_interval(row["scores"][s], score) for s in names)] for row in rows])
    if "train_first" in rows[0]:
        head = ["variant", "training split, first evaluation", "training split, last",
                "spread of validation over evaluations"]
        keys = "train_first", "train_last", "spread"
        lines += markdown(head, [[row["variant"], *(show(row[key], score) for key in keys)] for row in rows])
    if "accuracy_by_distance" in rows[0]:
        ranges = distance_ranges(rows[0]["accuracy_by_distance"])
        means = [[mean_within(row["accuracy_by_distance"], *limits) for limits in ranges] for row in rows]
        body = [[row["variant"], *(f"{100 * mean:.1f}" for mean in line)] for row, line in zip(rows, means)]
        lines += markdown(["right (%) at distance", *(f"{low}-{high}" for low, high in ranges)], body)
    if "hard" in rows[0]:
        lines += markdown(["hard reviews, right (%)", *rows[0]["hard"]],
                          [[row["variant"], *(f"{100 * x:.0f}" for x in row["hard"].values())] for row in rows])
    if "next" in rows[0]:
        lines += markdown(["after", *(row["variant"] for row in rows)],
                          [[prompt, *("{} ({})".format(*row["next"][prompt]) for row in rows)]
                           for prompt in rows[0]["next"]])
    return lines


def mean_within(by_distance, low, high):
    """The mean accuracy of the distances from low to high."""
    return np.mean([accuracy for distance, accuracy in by_distance if low <= distance <= high])


def distance_ranges(by_distance):
    """[(1, 1), (2, 3), (4, 7), ...]: those between powers of two that hold one of the distances."""
    exponents = sorted({int(distance).bit_length() for distance, _ in by_distance})
    return [(2 ** (n - 1), 2**n - 1) for n in exponents]


def add_ratios(table, *peers):
    """Add to each row how many times as fast it is as those named `peers`, where they are there."""
    speeds = {next(iter(row.values())): row["tokens/s"] for row in table}
    for row in table:
        row |= {f"times {name}": row["tokens/s"] / speeds[name] for name in peers if name in speeds}
    return table


def print_table(rows):
    """Print rows, dicts with the same keys, as a Markdown table."""
    def cell(name, value):
        if value is None:
            return "-"
        if isinstance(value, float):
            if name.endswith("^"):
                return f"{value:.2f}"
            if name.startswith(("pairs", "of ")):
                return f"{value:.1%}"
            return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        return str(value)

    table = [list(rows[0])] + [[cell(*item) for item in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    for line in table:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")
