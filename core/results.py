"""What compare.py reads from the folder of one run: its scores, and what its best weights answer."""

import json

import numpy as np
import torch

from core.config import UserError
from core.heat import read_reviews
from core.inference import encode, next_tokens, predict
from core.readers import is_number, read_log, read_predictions
from core.report import SCORES, main_score


def read_if_same(path, wanted):
    """The JSON object at `path` if it is of a run with the wanted settings and `warm_start`, else None."""
    try:
        saved = json.loads(path.read_text("utf-8"))
        have = {**saved["settings"], **saved["options"], "warm_start": saved.get("warm_start")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return saved if all(key in have and have[key] == value for key, value in wanted.items()) else None


def is_result(result, folder, wanted, hard, prompts):
    """Whether a dict has all that the comparison reads from the result of a run with the wanted settings.

    folder: of the run. hard, prompts: compare.py's.
    """
    try:
        scores, curves = result["scores"], [result["curve"], *([result["train_curve"]] if wanted["eval_train"] else [])]
        numbers = [*scores.values(), result["seconds"], result["work"]]
        numbers += [x for curve in curves for pair in curve for x in pair]
        numbers += [x for pair in result.get("accuracy_by_distance", []) for x in pair]
        numbers += [] if result["kept_share"] is None else [result["kept_share"]]
        numbers += result["hard"].values() if hard else []
        numbers += [result["next"][prompt][1] for prompt in prompts]
        return (all(map(is_number, numbers)) and result["split"] == ("test" if wanted["eval_test"] else "val")
                and bool(scores) and scores.keys() <= SCORES.keys()
                and all(len(curve) >= 2 and all(len(pair) == 2 for pair in curve) for curve in curves)
                and ("auc" not in scores or (folder / f"predictions-{result['split']}.npz").exists())
                and all(type(result["next"][prompt][0]) is str for prompt in prompts))
    except (KeyError, TypeError, AttributeError, IndexError):
        return False


def read_scores(folder):
    """Scores, curves and costs of a finished run, as far as its log has them. Raises UserError for one that is not
    finished."""
    records, whole = read_log(folder / "log.jsonl")
    records = [r for r in records if r["split"] == "val"]
    if not (whole and records):
        raise UserError(f"{folder} holds a run that is not finished")
    last = whole[-1]  # the test split where it was opened, else validation
    score = main_score(last)
    kept = [layer["kept_share"] for layer in last.get("stats", []) if "kept_share" in layer]
    result = {"split": last["split"], "scores": {name: last[name] for name in SCORES if name in last},
              "seconds": last.get("seconds"), "work": last.get("work"),
              "kept_share": float(np.mean(kept)) if kept else None,
              "curve": [[r["step"], r.get(score)] for r in records],
              **{key: last[key] for key in ("accuracy_by_distance",) if key in last}}
    if f"train_{score}" in records[0]:
        result["train_curve"] = [[r["step"], r.get(f"train_{score}")] for r in records]
    return result


def hard_reviews(path, classes=("negative", "positive")):
    """The reviews in a file, [{"text", "label", "kind"}]. Raises UserError where one lacks a label or a kind."""
    rows = read_reviews(path, classes)
    for row in rows:
        if row["label"] is None or not row["kind"]:
            raise UserError(f'hard: expected a "label" and a "kind" for every review in {path}, got '
                            f'{row["text"][:60]!r} without')
    return rows


def judge_hard(model, tokenizer, path, device, dtype):
    """{kind: share of its texts that are classified correctly}, of the reviews in a file."""
    texts, labels, kinds = zip(*((row["text"], row["label"], row["kind"]) for row in hard_reviews(path)))
    right = (predict(model, tokenizer, texts, device, dtype).cpu().numpy() > 0.5) == np.array(labels)
    return {kind: float(right[[k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)}


def continue_prompts(model, tokenizer, prompts, device):
    """{prompt: [likeliest token, its probability]}."""
    texts = {prompt: torch.tensor([encode(tokenizer, prompt)], device=device) for prompt in prompts}
    return {prompt: list(next_tokens(model, tokenizer, idx, 1)[0]) for prompt, idx in texts.items()}


def read_right_answers(folder):
    """Whether each text of the split that was judged is classified correctly, (N,)."""
    path = next(p for p in (folder / "predictions-test.npz", folder / "predictions-val.npz") if p.exists())
    p, labels, _ = read_predictions(path)
    return (p > 0.5) == labels
