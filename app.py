"""What a model attends to, in a browser: make demo, or streamlit run app.py

Reviews   a classifier's prediction for a text, the words that support or oppose it, and the maps of each layer and head
Text      what a language model generates, token by token, and the next tokens that it expects
Patterns  the pairs that a mechanism keeps, and the time that this saves on this machine
Training  losses and health of the runs below the working folder, also while they train

Visitors' text is shown as text, never as HTML or Markdown, which could make the browser load a picture from elsewhere.
"""

from core import startup  # first: torch reads its settings when it is loaded

import contextlib
import time

import streamlit as st
import torch

import sample
from core import curves, demo, explain, figures, hardware, inference, readers
from core.config import Text, UserError, convert
from core.mechanisms import mechanism
from core.pattern import draw_pattern, patterns
from model import GPT, GPTConfig

MAP_WORDS = 40  # of a heat map
NEXT_TOKENS = 10  # of the table below a generated text
MAX_CHARACTERS = 100_000  # of a text
EXAMPLE_REVIEW = "The effects were amazing, but the story was trash."


@contextlib.contextmanager
def show_errors():
    """Show an error that the visitor can correct as a sentence on the page."""
    try:
        yield
    except (UserError, OSError) as error:
        st.error(demo.escape_markdown(str(error)))


def persistent_key(key, options):
    """The key of a choice that is kept while its tab is hidden; values that are no longer options are dropped."""
    key = f"keep {key}"
    if isinstance(value := st.session_state.get(key), list):
        st.session_state[key] = [option for option in value if option in options]
    elif key in st.session_state and value not in options:
        del st.session_state[key]
    return key


@st.cache_resource(show_spinner=False)
def machine():
    """(device, dtype), measured once."""
    device = hardware.pick_device()
    return device, hardware.pick_dtype("auto", device)


@st.cache_resource(max_entries=8, show_spinner="Reading the checkpoint ...")
def read_run(folder, changed):
    """(model, tokenizer, classes) of a run's best weights. changed: the file's time, part of the cache's key."""
    model, tokenizer, classes = sample.read_run(folder / "best.pt")
    device, dtype = machine()
    if model.config.causal:
        inference.convert_for_inference(model.to(device), hardware.DTYPES[dtype])
    return model, tokenizer, classes


def open_run(folder, kind):
    """(model, tokenizer, classes) of a run's best weights. Raises UserError for a run of another kind."""
    run = read_run(folder, (folder / "best.pt").stat().st_mtime)
    if run[0].config.causal != (kind == "lm"):
        other = "language model: see Text" if kind == "classify" else "classifier: see Reviews"
        raise UserError(f"{folder} holds a {other}")
    return run


def find_runs(name):
    """{label: folder} of the folders with a file of this name, newest first; unreadable ones are named on the page."""
    runs, skipped = demo.find_runs(name)
    if skipped:
        st.caption(demo.escape_markdown(f"Skipped: {'; '.join(skipped)}"))
    return runs


def pick_runs(kind):
    """{label: folder} of the runs that the visitor chose; without runs, an offer to train one."""
    runs = {label: folder for label, folder in find_runs("best.pt").items() if demo.kind_of(folder) in (kind, "")}
    first = demo.best_run(runs)
    is_missing = first is None or not demo.kind_of(runs[first])
    if is_missing:
        st.info("There is no trained model for this below the working folder yet. Train one here:")
    is_training = any(job.code is None and demo.RECIPES[name][0] == kind for name, job in demo.jobs.items())
    with st.expander("Train a model" if is_missing else "Train another", expanded=is_missing or is_training):
        offer_training(kind)
    if not runs:
        return {}
    chosen = st.multiselect("Runs, newest first; several stand side by side", list(runs), first, max_selections=4,
                            key=persistent_key(f"{kind} runs", runs))
    return {label: runs[label] for label in chosen}


def offer_training(kind):
    """Show a button for each recipe, and the progress of the running ones."""
    for name, (recipe_kind, description) in demo.RECIPES.items():
        job = demo.jobs.get(name)
        if recipe_kind != kind:
            continue
        if job and job.code is None:
            show_progress(job)
        elif st.button(f"Train {name}: {description}", key=f"train {name}"):
            demo.start(name)
            st.rerun()
        elif job and job.code:
            st.warning(demo.escape_markdown(f"Training {name} ended: {job.lines()[-1]}"))


@st.fragment(run_every=1.0)
def show_progress(job):
    """Show the progress of a job, once a second; rerun the page when it ends."""
    if job.code is not None:
        st.rerun()
    lines = job.lines()
    st.progress(demo.progress(lines), f"Training {job.name}")
    st.text(lines[-1])
    if st.button("Stop", key=f"stop {job.name}"):
        job.stop()


def show_reviews():
    runs = pick_runs("classify")
    if not runs:
        return
    review = st.text_area("A review", EXAMPLE_REVIEW, key="keep review", height=80)
    if len(review) > MAX_CHARACTERS:
        st.caption(f"The text has {len(review):,} characters; the first {MAX_CHARACTERS:,} are read.")
    if not review[:MAX_CHARACTERS].strip():
        st.info("Type a review above, a sentence or a page, and press Ctrl+Enter.")
        return
    for (label, folder), column in zip(runs.items(), st.columns(len(runs))):
        with column, st.container(border=True), show_errors():
            show_review(label, folder, review[:MAX_CHARACTERS], len(runs) == 1)


def show_review(label, folder, review, wide):
    """Show one model's prediction for a review, and its reasons. wide: the page has room for two columns."""
    left, right = st.columns([2, 3]) if wide else (st.container(), st.container())
    with left:
        st.markdown(f"**{demo.escape_markdown(label)}**")
        model, tokenizer, classes = open_run(folder, "classify")
        p = float(inference.predict(model, tokenizer, [review], "cpu", "float32")[0])
        st.metric("Prediction", f"{classes[p > 0.5]} {max(p, 1 - p):.1%}")
        x, lengths = inference.review_batch(model, tokenizer, [review], "cpu")
        if tokenizer.kind == "words":
            toy = ": a toy, trained on made-up sentences, which cannot judge real films" * demo.is_toy(folder)
            st.caption(f"Its vocabulary has {demo.word_count(tokenizer):,} words{toy}.")
        if x.size(1) == model.config.block_size:
            st.caption(f"It reads {x.size(1)} tokens at most; the text after them is ignored.")
        words, known, sizes = demo.display_words(tokenizer, x[0].tolist(), review)
        weights = pick_weights(label, model.maps(x, lengths))
        if weights is not None:
            weights = torch.stack([part.sum(1) for part in weights.split(sizes, 1)], 1)  # (queries, words)
        if weights is not None and st.toggle("Shade by attention", key=f"keep {label} attention",
                                             help="off: by the change of the log-odds without each word"):
            shade(words, known, "attention", weights.mean(0).tolist())
        else:
            shade(words, known, "occlusion", occlusion(folder, (folder / "best.pt").stat().st_mtime, review))
    if weights is not None and len(weights) > 1:
        with right:
            first = st.slider("From word", 0, len(words) - MAP_WORDS) if len(words) > MAP_WORDS else 0
            rows = torch.stack([part.mean(0) for part in weights.split(sizes)])
            rows = rows[first:, first:][:MAP_WORDS, :MAP_WORDS].tolist()
            st.vega_lite_chart(demo.heat_map(rows, words[first : first + MAP_WORDS]))
            st.caption("The attention of a word (row) to another (column).")


@st.cache_data(max_entries=64, show_spinner="Leaving out each word ...")
def occlusion(folder, changed, review):
    """The change of the log-odds due to each word of a review: see `explain.occlusion`."""
    model, tokenizer, _ = open_run(folder, "classify")
    batch = inference.review_batch(model, tokenizer, [review], "cpu")
    return explain.word_scores("occlusion", model, tokenizer, *batch)[1]


def pick_weights(label, maps):
    """The attention weights (queries, T) in the layer and head that the visitor chooses, None without attention.

    maps: of each layer (1, H, T, T); (1, 1, 1, T) of additive attention, whose one query is no word; [] without.
    """
    if not maps:
        return None
    place, layers = st.columns(2), range(len(maps))
    layer = place[0].selectbox("Layer", layers, len(maps) - 1, key=persistent_key(f"{label} layer", layers))
    heads = ["mean", *range(maps[layer].size(1))]
    head = place[1].selectbox("Head", heads, key=persistent_key(f"{label} head", heads))
    return maps[layer][0].mean(0) if head == "mean" else maps[layer][0, head]


def shade(words, known, method, scores):
    """Show words shaded by their scores, with a legend."""
    st.html(demo.shaded_html(words, known, method, scores))
    largest = f"{max(scores):.1%}" if method == "attention" else f"{max(scores, key=abs):+.2f}"
    st.caption(f"{explain.METHODS[method].capitalize()} ({largest}). Dotted: words that the model does not know.")


def show_text():
    runs = pick_runs("lm")
    if not runs:
        return
    prompt = st.text_area("Prompt", key="keep prompt", height=80,
                          placeholder="The beginning of the text; empty: a new document")
    place = st.columns(6)
    temperature = place[0].slider("Temperature", 0.0, 2.0, 0.8, 0.05, key="keep temperature", help="0: greedy")
    top_k = place[1].number_input("Top-k", 0, None, 200, key="keep top-k",
                                  help="sample from the k likeliest tokens; 0: from all")
    top_p = place[2].slider("Top-p", 0.05, 1.0, 1.0, 0.05, key="keep top-p",
                            help="sample from the fewest tokens that hold this share of the probability")
    length = place[3].number_input("Tokens", 1, 10_000, 300, key="keep tokens")
    seed = place[4].number_input("Seed", 0, 2**31, 1337, key="keep seed")
    end = place[5].text_input("End before", key="keep end", help="the text ends before these characters, and where the "
                              "model ends the document, if its data mark that")
    with st.container(horizontal=True, vertical_alignment="center"):
        write = st.button("Write", type="primary")
        st.button("Stop")  # any press reruns the page, which ends the loop below
        ask = st.toggle("Next tokens", key="keep next", help="the tokens that are most likely to follow the prompt")
    texts, streams, spots = st.session_state.setdefault("texts", {}), {}, {}
    for (label, folder), column in zip(runs.items(), st.columns(len(runs))):
        with column, st.container(border=True), show_errors():
            st.markdown(f"**{demo.escape_markdown(label)}**")
            spots[label] = st.empty(), st.empty()
            if write:
                texts.pop(label, None)
                model, tokenizer, _ = open_run(folder, "lm")
                how = int(length), temperature, int(top_k), top_p
                texts[label], streams[label] = demo.stream(model, tokenizer, machine()[0], prompt[-MAX_CHARACTERS:],
                                                           [end] * bool(end), int(seed), *how)
            if label in texts:
                refresh(spots[label], texts[label])
            if ask:
                show_next(folder, prompt[-MAX_CHARACTERS:])
    write_texts(streams, texts, spots)


def write_texts(streams, texts, spots):
    """Draw tokens of each stream in turn until all have ended, and show the texts as they grow."""
    last = time.perf_counter()
    while streams:
        streams = {label: tokens for label, tokens in streams.items() if next(tokens, False)}
        if not streams or time.perf_counter() - last > 0.08:  # seconds: faster, nobody could read
            last = time.perf_counter()
            for label in spots.keys() & texts.keys():
                refresh(spots[label], texts[label])


def show_next(folder, prompt):
    """Show the tokens that a model expects after a prompt, as a table."""
    model, tokenizer, _ = open_run(folder, "lm")
    ids = inference.encode_prompt(tokenizer, prompt)[-model.config.block_size :]
    likeliest = inference.next_tokens(model, tokenizer, torch.tensor([ids], device=machine()[0]), NEXT_TOKENS)
    st.table([{"next token": demo.escape_markdown(token), "probability": f"{p:.2%}"} for token, p in likeliest])
    st.caption("After the prompt, before temperature, top-k and top-p.")


def refresh(spot, state):
    spot[0].code(state["text"], language=None, wrap_lines=True)
    speed = state["tokens"] / max(state["seconds"], 1e-9)
    spot[1].caption(f"{state['tokens']} tokens, {speed:,.0f} tokens/s{state['note']}")


def pick_options(name, given):
    """A mechanism's options as the visitor sets them: a field for each, with the comment in the mechanism's file."""
    chosen, place, comments = {}, None, demo.option_comments(name)
    for n, (key, default) in enumerate(mechanism(name)[1].items()):
        place = place if n % 3 else st.columns(3, vertical_alignment="bottom")
        comment = comments.get(key)
        field = {"key": f"keep {name} {key} {given}", "help": demo.escape_markdown(comment) if comment else None}
        if type(default) is bool:
            chosen[key] = place[n % 3].toggle(key, given.get(key, default), **field)
        else:
            value = place[n % 3].text_input(key, str(given.get(key, default)), **field)
            chosen[key] = convert(key, Text(value), default, name)
    return chosen


def new_layer(name, options, T, causal, head_size=16):
    """The attention layer of a mechanism in a model of one layer of four heads."""
    torch.manual_seed(0)  # of periods that begin at random
    config = GPTConfig(block_size=T, vocab_size=1, n_layer=1, n_head=4, n_embd=4 * head_size, attention=name,
                       n_class=0 if causal else 2, options=dict(options))
    return GPT(config).layers[0].attention


@st.cache_data(max_entries=32, show_spinner="Drawing ...")
def pattern_of(name, options, T, causal):
    """(picture of a mechanism's masks, pairs kept, multiplied, and of dense attention), pairs per head."""
    layer = new_layer(name, options, T, causal).eval().requires_grad_(False)
    picture = figures.png(draw_pattern(*patterns([layer], name, min(T, 512))))
    return picture, layer.kept_pairs(T), layer.multiplied_pairs(T), T * (T + 1) / 2 if causal else T * T


@st.cache_data(max_entries=32, show_spinner="Drawing ...")
def spans_of(folder, changed):
    return figures.png(curves.draw_spans(readers.read_log(folder / "log.jsonl")[0]))


def show_pattern():
    choices, place = demo.mechanism_choices(), st.columns([2, 2, 1])
    name, given = choices[place[0].selectbox("Mechanism", list(choices), 1, key="keep mechanism")]
    T = place[1].select_slider("T, tokens of a text", [2**n for n in range(5, 13)], 256, key="keep T")
    causal = place[2].toggle("Causal", True, key="keep causal", help="off: both directions, as in a classifier")
    options = pick_options(name, given)
    picture, kept, multiplied, dense = pattern_of(name, options, T, causal)
    place = st.columns(3)
    place[0].metric("Pairs kept per head", f"{kept:,.0f}", help="query-key pairs whose weight is not 0")
    place[1].metric("Kept, share of dense", f"{kept / dense:.1%}")
    place[2].metric("Work, share of dense", f"{multiplied / dense:.1%}",
                    help="pairs multiplied: the blocks include dropped pairs")
    st.image(picture, f"A row a query, a column a key{f'; the first 512 positions of {T:,}' if T > 512 else ''}")
    if st.button(f"Measure the time at T = {T:,} here"):
        with st.spinner("Measuring ..."):
            device, dtype = machine()
            layers = {"dense": ("dense", {}), "as above": (name, options)}
            layers = {label: new_layer(*each, T, causal, 64).to(device) for label, each in layers.items()}
            seconds = demo.time_attention(list(layers.values()), T, device, dtype)
        st.table([{"attention": label, "ms, forward and backward": f"{1e3 * s:.2f}",
                   "times as fast as dense": f"{seconds[0] / s:.2f}"} for label, s in zip(layers, seconds)])


def show_spans():
    runs = {label: folder for label, folder in find_runs("log.jsonl").items()
            if any(layer.get("spans") for layer in demo.first_record(folder).get("stats", []))}
    if not runs:
        st.caption("For a run of --attention=adaptive_attention_span this shows the learned span of each head.")
        return
    folder = runs[st.selectbox("Spans that a run has learned, by layer and head", list(runs),
                               key=persistent_key("spans", runs))]
    st.image(spans_of(folder, (folder / "log.jsonl").stat().st_mtime))


def show_training():
    runs, active = find_runs("log.jsonl"), []
    with st.expander("Train a model", expanded=not runs):
        offer_training("classify")
        offer_training("lm")
    for label, folder in runs.items():
        with contextlib.suppress(UserError, OSError):
            active += [label] * demo.is_running(folder)
    if runs:
        chosen = st.multiselect("Runs, newest first", list(runs), active or demo.best_run(runs),
                                key=persistent_key("training", runs))
        interval = 2.0 if set(active) & set(chosen) else None  # seconds
        st.fragment(lambda: show_curves({label: runs[label] for label in chosen}), run_every=interval)()


def show_curves(runs):
    """Show the scores of runs over their steps, and the health of each."""
    logs = {}
    for label, folder in runs.items():
        with show_errors():
            logs[label] = readers.read_log(folder / "log.jsonl")
    lines = demo.score_lines(logs)
    for key, place in zip(lines, st.columns(max(1, len(lines)))):
        place.line_chart(dict(zip(("step", key, "run"), zip(*lines[key]))), x="step", y=key, color="run")
    for label, (records, whole) in logs.items():
        with st.container(border=True), show_errors():
            state = "finished" if whole else "training now" if demo.is_running(runs[label]) else "stopped"
            st.markdown(f"**{demo.escape_markdown(label)}**: {state}")
            show_health([*records, *whole])


def show_health(records):
    """Show the last step, the last figures of training, and the last scores of each split."""
    last = {(record["split"], "whole" in record): record for record in records}
    training = last.get(("train", False), {})
    place = st.columns(4)
    place[0].metric("Step", f"{max(record['step'] for record in records):,d}")
    for column, key, name, form in zip(place[1:], ("tokens_per_second", "matmul_share", "grad_norm"),
                                       ("Tokens/s", "Share of matmul rate", "Gradient norm"), (",.0f", ".0%", ".2f")):
        column.metric(name, format(training[key], form) if key in training else "unknown")
    for (split, is_whole), record in last.items():
        text = demo.health_text(record)
        st.text(f"{split}{', whole, best weights' * is_whole}, step {record['step']}: {text}")


def main():
    st.set_page_config("nanoAttention", layout="wide")
    for key in [key for key in st.session_state if key.startswith("keep ")]:
        st.session_state[key] = st.session_state[key]  # Streamlit drops the settings of a hidden tab
    st.html("<style>[data-testid=stMainBlockContainer] {padding-top: 2.5rem}</style>")
    st.subheader("nanoAttention", anchor=False)
    tabs = {"Reviews": [show_reviews], "Text": [show_text], "Patterns": [show_pattern, show_spans],
            "Training": [show_training]}
    for tab, parts in zip(st.tabs(list(tabs), on_change="rerun", key="part"), tabs.values()):
        if tab.open:
            for part in parts:
                with tab, show_errors():
                    part()


main()
