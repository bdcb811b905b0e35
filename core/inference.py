"""Inference: conversion of a trained model, the next token, the label of a text, and text between tokens and terminal.

Letters: B batch, T time, N texts, V vocabulary.
"""

import codecs
import math

import torch
import torch.nn as nn

from core import hardware
from core.config import UserError
from core.tokenizer import html_line_breaks


class PackedLinear(nn.Module):
    """A bfloat16 linear layer for inference whose weight is stored in oneDNN's blocked layout.

    A plain weight is reordered at every call. For a single token that takes as long as the product.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    @staticmethod
    def is_supported():
        """Whether oneDNN computes in bfloat16 on this processor (x86: avx512bw or avx_ne_convert)."""
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def convert_for_inference(model, dtype):
    """Convert a language model in place for inference (irreversible) and return it.

    Weights become `dtype`, except the parameters of attention's bias: a span rounded to bfloat16 would be another mask.
    In bfloat16 on a CPU that supports it, the weights of linear layers are packed.
    """
    mask_parameters = model.mask_parameters()
    exact = [p.data for p in mask_parameters]
    model.to(dtype).eval().requires_grad_(False)
    for p, data in zip(mask_parameters, exact):
        p.data = data
    if dtype == torch.bfloat16 and model.embedding.weight.device.type == "cpu" and PackedLinear.is_supported():
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, PackedLinear(child))
    return model


def encode(tokenizer, text):
    """Token ids (list of int) of a text that begins a document. Raises UserError for an unknown character."""
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"the prompt: {error}")
    return ([] if tokenizer.mark is None else [tokenizer.mark]) + ids


def encode_prompt(tokenizer, text):
    """`encode` for a language model: at least one token. An empty text without a mark becomes a line end, if there is
    one in the vocabulary, else token 0."""
    line_ends = (i for i in range(tokenizer.vocab_size) if tokenizer.decode_bytes([i]) == b"\n")
    return encode(tokenizer, text) or [next(line_ends, 0)]


class Printer:
    """Incremental decoder of generated tokens into text: returns complete characters only.

    The text ends before the document mark, and before the stop text that is complete first; `ended` is then True. The
    prompt is not searched for stop texts.
    """

    def __init__(self, tokenizer, last="", stops=()):
        """last: the previous character, "" at the beginning. stops: texts, none of them empty."""
        self.tokenizer, self.last, self.stops = tokenizer, last, stops
        self.held, self.ended = "", False  # held: the end of the text so far, which may begin a stop text
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, ids, final=False):
        """The text (str) that `ids` (list) complete and that belongs to no stop text. With `final`, nothing is held
        back, and incomplete bytes become replacement characters."""
        if self.ended:
            return ""
        if self.tokenizer.mark in ids:
            ids, final, self.ended = ids[: ids.index(self.tokenizer.mark)], True, True
        text = self.held + self.decode(ids, final)
        if found := [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]:
            self.ended = True
            return text[: min(found)[1]]
        prefixes = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        size = 0 if final else max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        self.held = text[len(text) - size :]
        return text[: len(text) - size]

    def decode(self, ids, final):
        text = self.decoder.decode(self.tokenizer.decode_bytes(ids), final)
        # a word starts with a space, which is wrong at the beginning and after these characters
        if self.tokenizer.kind == "words" and text[:1] == " " and self.last in " \n([{":
            text = text[1:]
        self.last = text[-1:] or self.last
        return text


def review_batch(model, tokenizer, texts, device):
    """Texts as a padded batch, each cut to the block size: x (B, T) token ids, lengths (B,)."""
    ids = [encode(tokenizer, html_line_breaks(text)) for text in texts]
    ids = [torch.tensor(each[: model.config.block_size]) for each in ids]
    lengths = torch.tensor([len(each) for each in ids], device=device)
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device), lengths


@torch.no_grad()
def predict(model, tokenizer, texts, device, dtype):
    """The probability of class 1 of each text, (N,). Raises UserError for an empty text or non-finite logits."""
    probabilities = []
    for first in range(0, len(texts), 32):
        x, lengths = review_batch(model, tokenizer, texts[first : first + 32], device)
        if lengths.min() < 1:
            raise UserError(f"expected texts to classify, got an empty one: {texts[first + int(lengths.argmin())]!r}")
        with hardware.autocast(device, dtype):
            logits = model(x, lengths=lengths)[0].float()
        check_finite(logits)
        probabilities.append(torch.softmax(logits, -1)[:, 1])
    return torch.cat(probabilities)


def check_finite(logits):
    """Raise UserError unless all logits are finite."""
    if not logits.isfinite().all():
        raise UserError("the model's scores are not finite; try --dtype=float32, or another checkpoint")


@torch.no_grad()
def next_tokens(model, tokenizer, idx, count):
    """The `count` most likely tokens after idx (1, T): [(token in printable form, probability)], the most likely first.

    The probabilities are those of the model, before temperature, top_k and top_p. Raises UserError for logits that are
    not finite.
    """
    logits = model(idx)[0][0, -1].float()  # (V,)
    check_finite(logits)
    p, tokens = torch.softmax(logits, -1).sort(descending=True, stable=True)  # of equal ones the first, as argmax does
    return [(tokenizer.token(i), share) for i, share in zip(tokens[:count].tolist(), p[:count].tolist())]


def sample_next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Sample one token for each row of logits (B, V): (B,). Raises UserError if they are not finite.

    temperature: 0 takes the most likely token. top_k: sample from the k most likely tokens (0: all). top_p: sample from
    the smallest set of most likely tokens that holds this share of the probability.
    """
    check_finite(logits)
    if temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # differences, which overflow to -inf only
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    p = torch.softmax(logits, -1)
    if top_p < 1:
        sorted_p, order = p.sort(descending=True)
        cumulative = sorted_p.cumsum(-1) - sorted_p  # probability of all more likely tokens
        sorted_p = sorted_p.masked_fill(cumulative >= top_p, 0)
        sorted_p[:, 0] = sorted_p[:, 0].clamp(min=1e-30)  # the most likely token always stays
        p = torch.zeros_like(p).scatter(-1, order, sorted_p)
    return torch.multinomial(p, 1, generator=generator)[:, 0]
