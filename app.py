"""See what a model attends to, in a browser: make demo, or streamlit run app.py

Reviews   the label of a text, its words shaded by attention, and the maps of each layer and head
Text      what a language model writes, as it is drawn
Patterns  what a mechanism keeps, and what that saves on this machine
Training  losses and health of the runs below the working folder, also while they train

What visitors type is shown as text: never as HTML, nor as Markdown, which may name pictures to fetch.
"""

from core import openmp  # first: torch reads its settings when it is loaded

import contextlib
import html
import re
import threading
import time
from pathlib import Path

import streamlit as st
import torch

import bench
import plot
import sample
from core import demo, figures, hardware, heat, inference, readers
from core.config import Text, UserError, typed
from core.mechanisms import mechanism, mechanisms
from core.pattern import draw_pattern, patterns
from core.runs import format_scores, format_stats
from core.tokenizer import UNKNOWN
from model import GPT, GPTConfig

HERE = Path(__file__).resolve().parent
SHOWN = 40  # words of a heat map
LONGEST = 100_000  # characters of a text that are looked at
EXAMPLES = {  # mechanisms, with options that show at a glance what they do
    "dense": ("dense", {}),
    "sparse, local": ("sparse", {"window": 32}),
    "sparse, strided": ("sparse", {"sparse_pattern": "strided"}),
    "sparse, fixed": ("sparse", {"sparse_pattern": "fixed", "fixed_columns": 1}),
    "sparse, log": ("sparse", {"sparse_pattern": "log", "window": 4}),
    "adaptive span": ("adaptive_attention_span", {"span_init": [4.0, 16.0, 48.0, 112.0], "softness_span_mask": 16}),
    "adaptive span, periodic": ("adaptive_attention_span", {
        "span_init": [16.0, 48.0, 80.0, 112.0], "softness_span_mask": 16, "use_triangle_wave_masking": True}),
    "atrt": ("atrt", {}),
}

STYLE = """<style>
[data-testid=stMainBlockContainer] {padding-top: 2.5rem}
.shaded {line-height: 2.1}
.shaded span {padding: 2px 4px; border-radius: 4px; overflow-wrap: anywhere; unicode-bidi: isolate}
</style>"""


@contextlib.contextmanager
def told():
    """What a visitor can mend becomes a sentence on the page."""
    try:
        yield
    except (UserError, OSError) as error:
        st.error(demo.plain(str(error)))


def keep(key, options):
    """The key of a choice that outlives its part's being hidden, without what is no longer among the options."""
    key = f"keep {key}"
    if isinstance(before := st.session_state.get(key), list):
        st.session_state[key] = [option for option in before if option in options]
    elif key in st.session_state and before not in options:
        del st.session_state[key]
    return key


# ---- runs ------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def machine():
    """(device, dtype), measured once."""
    device = hardware.pick_device()
    return device, hardware.pick_dtype("auto", device)


@st.cache_resource(max_entries=8, show_spinner="Reading the checkpoint ...")
def opened(folder, changed, kind):
    """(model, tokenizer, classes) of a run's best weights. changed: when they were written, for the cache."""
    model, tokenizer, classes = sample.read_run(folder / "best.pt")
    if model.config.causal != (kind == "lm"):
        raise UserError(f"{folder} holds a {'language model: see Text' if kind == 'classify' else 'classifier: see Reviews'}")
    device, dtype = machine()
    return (model.to(device).for_sampling(hardware.DTYPES[dtype]) if kind == "lm" else model), tokenizer, classes


def open_run(folder, kind):
    return opened(folder, (folder / "best.pt").stat().st_mtime, kind)


def find_runs(name):
    """{label: folder} of the folders that hold a file of this name, newest first; those that cannot be read are named."""
    runs, skipped = demo.find_runs(name)
    if skipped:
        st.caption(demo.plain(f"Skipped: {'; '.join(skipped)}"))
    return runs


def pick_runs(kind):
    """{label: folder} of the runs that the visitor picked; an offer to train where there are none."""
    runs = {label: folder for label, folder in find_runs("best.pt").items() if demo.kind_of(folder) in (kind, "")}
    first = sorted(runs, key=lambda label: not demo.kind_of(runs[label]))[:1]  # the newest that has a log
    missing = not first or not demo.kind_of(runs[first[0]])
    if missing:
        st.info("There is no trained model for this below the working folder yet. Train one here:")
    with st.expander("Train another") if not missing and not is_training(kind) else contextlib.nullcontext():
        offer(kind)
    if not runs:
        return {}
    chosen = st.multiselect("Runs, newest first; several stand side by side", list(runs), first, key=keep(f"{kind} runs", runs),
                            max_selections=4)
    return {label: runs[label] for label in chosen}


# ---- training from the page ------------------------------------------------------------------


def is_training(kind):
    """Whether a recipe of this kind is being trained from the page."""
    return any(job.code is None and demo.RECIPES[name][0] == kind for name, job in demo.jobs.items())


def offer(kind):
    """A button for each recipe, and how far those are that run."""
    for name, (of, what) in demo.RECIPES.items():
        job = demo.jobs.get(name)
        if of != kind:
            continue
        if job and job.code is None:
            progress(job)
        elif st.button(f"Train {name}: {what}", key=f"train {name}"):
            demo.start(name)
            st.rerun()
        elif job and job.code:
            st.warning(demo.plain(f"Training {name} ended: {job.lines()[-1]}"))
    if kind == "classify":
        st.caption("Train imdb needs no network where the reviews are prepared: "
                   "`python data/imdb/prepare.py --source=aclImdb_v1.tar.gz`")


@st.fragment(run_every=1.0)
def progress(job):
    """How far a job is, once a second; the whole page anew when it ends."""
    if job.code is not None:
        st.rerun()
    lines = job.lines()
    steps = re.findall(r"step (\d+)/(\d+)", "\n".join(lines))
    st.progress(int(steps[-1][0]) / int(steps[-1][1]) if steps else 0.0, f"Training {job.name}")
    st.text(lines[-1])
    if st.button("Stop", key=f"stop {job.name}"):
        job.stop()


# ---- pictures --------------------------------------------------------------------------------


def show_map(matrix, rows, columns):
    """A heat map of weights (rows, columns) with the words' names; a value stands beside the pointer."""
    rows, columns = ([f"{n} {name[:24]}" for n, name in enumerate(names)] for names in (rows, columns))
    cells = [{"word": r, "looks at": c, "weight": v} for r, line in zip(rows, matrix) for c, v in zip(columns, line)]
    axis, kind = {"labelLimit": 110, "labelOverlap": False}, {"type": "nominal"}
    most = max((cell["weight"] for cell in cells), default=0) or 1
    blues = {"type": "quantitative", "scale": {"scheme": "blues", "domain": [0, most]}, "legend": None}
    encoding = {"x": {"field": "looks at", "sort": columns, "axis": {**axis, "labelAngle": -60}, **kind},
                "y": {"field": "word", "sort": rows, "axis": axis, **kind}, "color": {"field": "weight", **blues}}
    st.vega_lite_chart({"data": {"values": cells}, "mark": {"type": "rect", "tooltip": {"content": "data"}}, "encoding": encoding,
                        "width": "container", "height": 80 + 18 * len(rows), "usermeta": {"embedOptions": {"actions": False}}})


def shade(names, known, weights):
    """Words on a ground that darkens from the mean weight to the largest, dotted below where the model does not know them."""
    spans = []
    for name, is_known, weight, dark in zip(names, known, weights, heat.shades(list(zip(names, weights)))):
        note = f"{weight:.1%} of the weight" + ("" if is_known else f"; not in the vocabulary: read as {UNKNOWN}")
        look = f"background: rgba(230, 120, 0, {dark:.3f}){'' if is_known else '; border-bottom: 2px dotted'}"
        spans.append(f'<span style="{look}" title="{html.escape(note)}">{html.escape(name)}</span>')
    st.html(f'<div class="shaded">{" ".join(spans)}</div>')
    st.caption(f"Shaded: words of more than the mean weight, {1 / len(names):.1%}; the darkest has {max(weights):.1%}. "
               "Dotted: words that the model does not know.")


# ---- reviews ---------------------------------------------------------------------------------


def reviews():
    runs = pick_runs("classify")
    if not runs:
        return
    review = st.text_area("A review", "The effects were amazing, but the story was trash.", key="keep review", height=80)
    if len(review) > LONGEST:
        st.caption(f"The text has {len(review):,} characters; the first {LONGEST:,} are looked at.")
    if not review[:LONGEST].strip():
        st.info("Type a review above, a sentence or a page, and press Ctrl+Enter.")
        return
    for (label, folder), column in zip(runs.items(), st.columns(len(runs))):
        with column, st.container(border=True), told():
            one_review(label, folder, review[:LONGEST], len(runs) == 1)


def one_review(label, folder, review, alone):
    """What one model says of a review, and what it looks at. alone: there is room for two columns."""
    said, looked = st.columns([2, 3]) if alone else (st.container(), st.container())
    with said:
        st.markdown(f"**{demo.plain(label)}**")
        model, tokenizer, classes = open_run(folder, "classify")
        p = float(inference.predict(model, tokenizer, [review], "cpu", "float32")[0])
        st.metric("The model says", f"{classes[p > 0.5]} {max(p, 1 - p):.1%}")
        x, lengths = inference.review_batch(model, tokenizer, [review], "cpu")
        if tokenizer.kind == "words":
            toy = ": a toy that learned from made-up sentences, and no judge of films" * (tokenizer.vocab_size < 1000)
            st.caption(f"It knows {tokenizer.vocab_size:,} words{toy}.")
        if x.size(1) == model.config.block_size:
            st.caption(f"It reads {x.size(1)} tokens at most; what comes after them it has not seen.")
        names, known, sizes = demo.as_words(tokenizer, x[0].tolist(), review)
        maps = model.maps(x, lengths)  # of each layer (1, heads, T, T); additive attention: (1, 1, 1, T)
        if not maps:
            shade(names, known, [float(part.sum()) for part in model.word_weights(x, lengths)[0].split(sizes)])
            st.caption("No attention here: a word's weight is the share of channels whose largest value it holds.")
            return
        place = st.columns(2)
        layers = range(len(maps))
        layer = place[0].selectbox("Layer", layers, len(maps) - 1, key=keep(f"{label} layer", layers))
        heads = ["mean", *range(maps[layer].size(1))]
        head = place[1].selectbox("Head", heads, key=keep(f"{label} head", heads))
        weights = maps[layer][0].mean(0) if head == "mean" else maps[layer][0, head]  # (T, T)
        columns = torch.stack([part.sum(1) for part in weights.split(sizes, 1)], 1)  # (T, words)
        shade(names, known, columns.mean(0).tolist())
    if len(weights) > 1:
        with looked:
            first = st.slider("From word", 0, len(names) - SHOWN) if len(names) > SHOWN else 0
            rows = torch.stack([part.mean(0) for part in columns.split(sizes)])
            show_map(rows[first:, first:][:SHOWN, :SHOWN].tolist(), *2 * [names[first : first + SHOWN]])
            st.caption("How much a word (row) looks at another (column).")


# ---- text ------------------------------------------------------------------------------------


def text():
    runs = pick_runs("lm")
    if not runs:
        return
    prompt = st.text_area("Prompt", key="keep prompt", height=80, placeholder="How the text begins; nothing: a new document")
    place = st.columns(5)
    temperature = place[0].slider("Temperature", 0.0, 2.0, 0.8, 0.05, key="keep temperature", help="0: always the likeliest")
    top_k = place[1].number_input("Top-k", 0, None, 200, key="keep top-k", help="draw from the k likeliest; 0: from all")
    top_p = place[2].slider("Top-p", 0.05, 1.0, 1.0, 0.05, key="keep top-p", help="draw from the fewest that hold this share")
    length = place[3].number_input("Tokens", 1, 10_000, 300, key="keep tokens")
    seed = place[4].number_input("Seed", 0, 2**31, 1337, key="keep seed")
    with st.container(horizontal=True):
        write = st.button("Write", type="primary")
        st.button("Stop")  # any press runs the page anew, which ends the loop below
    drawn, streams, spots = st.session_state.setdefault("drawn", {}), {}, {}
    for (label, folder), column in zip(runs.items(), st.columns(len(runs))):
        with column, st.container(border=True), told():
            st.markdown(f"**{demo.plain(label)}**")
            spots[label] = st.empty(), st.empty()
            if write:
                drawn.pop(label, None)
                model, tokenizer, _ = open_run(folder, "lm")
                how = int(length), temperature, int(top_k), top_p
                drawn[label], streams[label] = demo.stream(model, tokenizer, machine()[0], prompt[-LONGEST:], int(seed), *how)
            if label in drawn:
                show_text(spots[label], drawn[label])
    shown = time.perf_counter()
    while streams:  # in turn, a token each
        streams = {label: tokens for label, tokens in streams.items() if next(tokens, False)}
        if not streams or time.perf_counter() - shown > 0.08:  # no more often than the eye can follow
            shown = time.perf_counter()
            for label in spots.keys() & drawn.keys():
                show_text(spots[label], drawn[label])


def show_text(spot, state):
    spot[0].code(state["text"], language=None, wrap_lines=True)
    spot[1].caption(f"{state['tokens']} tokens, {state['tokens'] / max(state['seconds'], 1e-9):,.0f} tokens/s{state['note']}")


# ---- patterns --------------------------------------------------------------------------------


def options_of(name, given):
    """A mechanism's options as the visitor sets them, a field for each with its reason from the mechanism's file."""
    source = (HERE / f"{'attention' if name == 'dense' else name}.py").read_text("utf-8")
    chosen, place = {}, None
    for n, (key, default) in enumerate(mechanism(name)[1].items()):
        place = place if n % 3 else st.columns(3, vertical_alignment="bottom")
        reason = re.search(rf"^{key} = .*?  # (.*)", source, re.M)
        look = {"key": f"keep {name} {key} {given}", "help": demo.plain(reason[1]) if reason else None}
        if type(default) is bool:
            chosen[key] = place[n % 3].toggle(key, given.get(key, default), **look)
        else:
            said = place[n % 3].text_input(key, str(given.get(key, default)), **look)
            chosen[key] = typed(key, Text(said), default, name)
    return chosen


@st.cache_data(max_entries=32, show_spinner="Drawing ...")
def drawn_pattern(name, options, T, causal):
    """(picture of a mechanism's masks, pairs kept, pairs multiplied, pairs of dense attention), of one of four heads."""
    torch.manual_seed(0)  # of periods that begin at random
    config = dict(block_size=T, vocab_size=1, n_layer=1, n_head=4, n_embd=64, n_class=0 if causal else 2)
    model = GPT(GPTConfig(**config, attention=name, options=dict(options))).eval().requires_grad_(False)
    layer = model.layers[0].attention
    picture = demo.png(draw_pattern, figures.figure(), *patterns([layer], name, min(T, 512)))
    return picture, layer.kept_pairs(T), layer.multiplied_pairs(T), T * (T + 1) / 2 if causal else T * T


@st.cache_data(max_entries=32, show_spinner="Drawing ...")
def drawn_spans(folder, changed):
    return demo.png(plot.draw_spans, readers.read_log(folder / "log.jsonl")[0])


@st.cache_resource
def turn():
    """One measurement at a time: two would slow each other, and their settings are bench.py's globals."""
    return threading.Lock()


def masks():
    choices, place, known = dict(EXAMPLES), st.columns([2, 2, 1]), {name for name, _ in EXAMPLES.values()}
    choices |= {other: (other, {}) for other in mechanisms() if other not in known}  # a stranger's, too
    name, given = choices[place[0].selectbox("Mechanism", list(choices), 1, key="keep mechanism")]
    T = place[1].select_slider("T, tokens of a text", [2**n for n in range(5, 13)], 256, key="keep T")
    causal = place[2].toggle("Causal", True, key="keep causal", help="off: both directions, as in a classifier")
    options = options_of(name, given)
    picture, kept, multiplied, dense = drawn_pattern(name, options, T, causal)
    place = st.columns(3)
    place[0].metric("Pairs kept of a head", f"{kept:,.0f}", help="query-key pairs whose weight is not 0")
    place[1].metric("Kept of dense attention's", f"{kept / dense:.1%}")
    place[2].metric("Work against dense", f"{multiplied / dense:.1%}", help="pairs multiplied: blocks hold some that are dropped")
    st.image(picture, f"A row a query, a column a key{f'; the first 512 positions of {T:,}' if T > 512 else ''}")
    if st.button(f"Measure the time at T = {T:,} here"):
        with st.spinner("Measuring ..."), turn():
            bench.device, bench.dtype = machine()
            bench.causal, bench.repeat, bench.budget = causal, 7, 3.0
            rows = [bench.Row("dense", "dense", "auto", {}), bench.Row("as above", name, "auto", options)]
            found = bench.bench_attention(rows, 1, 4, T)
        st.table([{"attention": row["attention"], "ms, forward and backward": f"{row['ms']:.2f}",
                   "times as fast as dense": f"{found[0]['ms'] / row['ms']:.2f}"} for row in found])


def spans():
    runs = {label: folder for label, folder in find_runs("log.jsonl").items()
            if any(layer.get("spans") for layer in demo.first_record(folder).get("stats", []))}
    if not runs:
        st.caption("A run trained with --attention=adaptive_attention_span shows here how far its heads look.")
        return
    folder = runs[st.selectbox("Spans that a run has learned, by layer and head", list(runs), key=keep("spans", runs))]
    st.image(drawn_spans(folder, (folder / "log.jsonl").stat().st_mtime))


# ---- training --------------------------------------------------------------------------------


def training():
    runs, active = find_runs("log.jsonl"), []
    with st.expander("Train a model", expanded=not runs):
        offer("classify")
        offer("lm")
    for label, folder in runs.items():
        with contextlib.suppress(UserError, OSError):
            active += [label] * demo.running(folder)
    if runs:
        chosen = st.multiselect("Runs, newest first", list(runs), active or list(runs)[:1], key=keep("training", runs))
        again = 2.0 if set(active) & set(chosen) else None  # seconds
        st.fragment(lambda: curves({label: runs[label] for label in chosen}), run_every=again)()


def curves(runs):
    """Losses of runs over their steps, and how each of them does."""
    logs, lines = {}, {}
    for label, folder in runs.items():
        with told():
            logs[label] = readers.read_log(folder / "log.jsonl")
    for key in plot.SCORES:
        for label, (records, _) in logs.items():
            for record in records:
                if key in record:
                    lines.setdefault(key, []).append((record["step"], record[key], f"{label}, {record['split']}"))
    for key, place in zip(lines, st.columns(max(1, len(lines)))):
        place.line_chart(dict(zip(("step", key, "run"), zip(*lines[key]))), x="step", y=key, color="run")
    for label, (records, whole) in logs.items():
        with st.container(border=True), told():
            state = "finished" if whole else "training now" if demo.running(runs[label]) else "stopped"
            st.markdown(f"**{demo.plain(label)}**: {state}")
            health([*records, *whole])


FIGURES = (("step", "Step", ",d"), ("tokens_per_second", "Tokens/s", ",.0f"), ("matmul_share", "Of the matmul rate", ".0%"),
           ("grad_norm", "Norm of the gradient", ".2f"))


def health(records):
    """The last figures of training, and the last scores of each split."""
    last = {(record["split"], "whole" in record): record for record in records}
    if record := last.get(("train", False)):
        for place, (key, name, form) in zip(st.columns(len(FIGURES)), FIGURES):
            place.metric(name, format(record[key], form) if key in record else "unknown")
    for (split, best), record in last.items():
        scores = {key: record[key] for key in (*plot.SCORES, "f1", "precision", "recall", "auc") if key in record}
        said = format_scores(scores) + format_stats(record.get("stats", []))
        st.text(f"{split}{', whole, best weights' * best}, step {record['step']}: {said}")


# ---- the page --------------------------------------------------------------------------------


def main():
    st.set_page_config("nanoAttention", layout="wide")
    for key in [key for key in st.session_state if key.startswith("keep ")]:
        st.session_state[key] = st.session_state[key]  # Streamlit forgets the settings of a part that is not shown
    st.html(STYLE)
    st.subheader("nanoAttention", anchor=False)
    parts = {"Reviews": [reviews], "Text": [text], "Patterns": [masks, spans], "Training": [training]}
    for tab, shown in zip(st.tabs(list(parts), on_change="rerun", key="part"), parts.values()):
        if tab.open:
            for part in shown:
                with tab, told():
                    part()


main()
