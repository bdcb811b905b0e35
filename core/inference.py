"""What a trained model is asked: texts as batches, the next token, the label of a text.

Letters: B batch, T time, N texts, V vocabulary.
"""

import codecs
import math
import re

import torch

from core import hardware
from core.config import UserError


def encode(tokenizer, text):
    """Token ids (list of int) of a text that begins a document."""
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"the prompt: {error}")
    return ([] if tokenizer.mark is None else [tokenizer.mark]) + ids


class Printer:
    """Turns tokens that come one by one into text, so that no character is ever shown half."""

    def __init__(self, tokenizer, last=""):
        self.tokenizer, self.last = tokenizer, last  # last: the character before, "" at the beginning
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, ids, final=False):
        """The text (str) that `ids` complete; with `final` also what no token will complete any more."""
        text = self.decoder.decode(self.tokenizer.decode_bytes(ids), final)
        # A word brings its own space, which is one too many at the beginning, and after these.
        if self.tokenizer.kind == "words" and text[:1] == " " and self.last in " \n([{":
            text = text[1:]
        self.last = text[-1:] or self.last
        return text


def review_batch(model, tokenizer, texts, device):
    """(x (B, T), lengths (B,)) of texts, each cut to the block size."""
    # reviews on one line keep their line ends as HTML; data/imdb stores them as line ends
    ids = [encode(tokenizer, re.sub(r"<br\s*/?>", "\n", text, flags=re.I)) for text in texts]
    ids = [torch.tensor(each[: model.config.block_size]) for each in ids]
    lengths = torch.tensor([len(each) for each in ids], device=device)
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device), lengths


@torch.no_grad()
def predict(model, tokenizer, texts, device, dtype):
    """The probability of class 1 of each text, (N,). Raises UserError where a text has no tokens, or scores are not finite."""
    found = []
    for first in range(0, len(texts), 32):
        x, lengths = review_batch(model, tokenizer, texts[first : first + 32], device)
        if lengths.min() < 1:
            raise UserError(f"expected texts to classify, got an empty one: {texts[first + int(lengths.argmin())]!r}")
        with hardware.autocast(device, dtype):
            logits = model(x, lengths=lengths)[0].float()
        check_finite(logits)
        found.append(torch.softmax(logits, -1)[:, 1])
    return torch.cat(found)


def check_finite(logits):
    """Raise UserError where a model's output is not finite: what is drawn from it would be no answer of the model's."""
    if not logits.isfinite().all():
        raise UserError("the model's scores are not finite; try --dtype=float32, or another checkpoint")


def sample_next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token for each row of logits (B, V): (B,). Raises UserError where they are not finite."""
    check_finite(logits)
    if temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # differences: the quotient may overflow, to -inf only
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    p = torch.softmax(logits, -1)
    if top_p < 1:
        falling, order = p.sort(descending=True)
        before = falling.cumsum(-1) - falling  # what the likelier tokens hold together
        falling = falling.masked_fill(before >= top_p, 0)
        falling[:, 0] = falling[:, 0].clamp(min=1e-30)  # the likeliest always stays
        p = torch.zeros_like(p).scatter(-1, order, falling)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
