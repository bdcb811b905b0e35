"""How much a classifier's answer depends on each word of a text: by occlusion, or by attention.

occlusion   the log-odds of the predicted class minus those for the text without the word (Zeiler and Fergus 2014; Li,
            Monroe and Jurafsky 2016). Above 0 the word supports the answer, below 0 it opposes it.
attention   the share of attention that the word receives. It shows where the model looks, not what decides.

Letters: B batch, T time, W words.
"""

import torch
import torch.nn.functional as F

METHODS = {  # {name: what the shades of a page mean}
    "occlusion": "orange words support the answer, blue words oppose it; the darkest changes its log-odds most",
    "attention": "shaded words receive more than the mean attention, the darkest most",
}
SMALLEST = 0.1  # change of the log-odds that may get the darkest shade: texts of smaller ones stay pale
BATCH = 32  # texts of one forward pass


def split_words(tokenizer, ids):
    """Group a text's token ids into words: (words, W strings; tokens of each word, W ints).

    A word is what stands between spaces, with all of its tokens. The document mark, and each token of a tokenizer of
    words, is a word by itself.
    """
    pieces, separate = [], True
    for i in ids:
        piece = tokenizer.token(i).encode() if i == tokenizer.mark else tokenizer.decode_bytes([i])
        follows_separate, word = separate, pieces[-1][0] if pieces else b""
        separate = i == tokenizer.mark or tokenizer.kind == "words"
        if follows_separate or separate or word.strip() and (piece[:1].isspace() or word[-1:].isspace()):
            pieces.append([b"", 0])
        pieces[-1][0] += piece
        pieces[-1][1] += 1
    return [word.decode("utf-8", "replace").strip() or "␣" for word, _ in pieces], [size for _, size in pieces]


@torch.no_grad()
def attention_weights(model, idx, lengths=None):
    """The attention that each token receives in the last layer, (B, T): the mean over heads and a text's queries.

    A text's weights sum to 1; padding has 0. A model without attention, which pools by the maximum, gives the share of
    channels whose largest output is the token's.
    """
    T = idx.size(1)
    lengths = torch.full((len(idx),), T, device=idx.device) if lengths is None else lengths
    is_token = torch.arange(T, device=idx.device) < lengths[:, None]  # (B, T)
    maps = model.maps(idx, lengths)
    if not maps:
        largest = model.read(idx, lengths).masked_fill(~is_token[..., None], float("-inf")).argmax(1)  # (B, C)
        return F.one_hot(largest, T).float().mean(1)
    weights = maps[-1]  # (B, H, T, T); (B, 1, 1, T): one query for the whole text
    if weights.size(2) == 1:
        return weights[:, 0, 0]
    received = torch.einsum("bhij,bi->bj", weights, is_token.to(weights.dtype)) * is_token
    return received / received.sum(1, keepdim=True)


@torch.no_grad()
def occlusion(model, ids, sizes, mark=None):
    """The change of the predicted class's log-odds due to each word: (W,) float32, for one text.

    ids: (T,) token ids; sizes: tokens of each word, T in sum. The word that is the document mark, and a word without
    which nothing would remain, are not left out; they get 0.
    """
    parts = ids.split(sizes)
    left_out = [n for n, part in enumerate(parts) if len(part) < len(ids) and part.tolist() != [mark]]
    texts = [ids, *(torch.cat([*parts[:n], *parts[n + 1 :]]) for n in left_out)]
    log_p = []
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        lengths = torch.tensor([len(text) for text in batch], device=ids.device)
        logits = model(torch.nn.utils.rnn.pad_sequence(batch, batch_first=True), lengths=lengths)[0]
        log_p.append(torch.log_softmax(logits.float(), -1))
    log_p = torch.cat(log_p)  # (1 + words left out, classes)
    answer = log_p[0].argmax()
    is_other = torch.arange(log_p.size(1), device=ids.device) != answer
    log_odds = log_p[:, answer] - log_p[:, is_other].logsumexp(1)
    change = torch.zeros(len(sizes), device=ids.device)
    change[left_out] = log_odds[0] - log_odds[1:]
    return change


def word_scores(method, model, tokenizer, x, lengths):
    """(words, W strings; their scores, W floats) of one text x (1, T), by one of METHODS."""
    ids = x[0, : lengths[0]]
    words, sizes = split_words(tokenizer, ids.tolist())
    if method == "occlusion":
        return words, occlusion(model, ids, sizes, tokenizer.mark).tolist()
    return words, [float(part.sum()) for part in attention_weights(model, x, lengths)[0].split(sizes)]


def shades(method, scores):
    """The shade of each word, (W,) from -1 to 1, for scores (W,) by one of METHODS; 0: none.

    Attention from the mean to the largest becomes 0 to 1. Changes of the log-odds are divided by the largest.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    if method == "occlusion":
        return (scores / scores.abs().max().clamp(min=SMALLEST)).tolist()
    room = scores.max() - scores.mean()
    shaded = room > 1e-6 * scores.max()
    return ((scores - scores.mean()) / room).clamp(0, 1).tolist() if shaded else [0.0] * len(scores)
