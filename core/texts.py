"""The texts of a batch as attention sees them: their padding, their documents and their forget gates.

Letters: B batch, T time, H heads; n queries, m keys.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch


class Texts(NamedTuple):
    """What the texts of a batch add to the mechanism's bias; a field that is None adds nothing.

    lengths: (B,) tokens of each example; the rest is padding.
    documents: (B, T) the position at which each token's document starts. A token sees its own document only.
    decay: (B, H, T) the sum of log forget gates up to each token. A pair's score gets the sum between its two tokens.
    least: (B, H, T) by query: kernels may leave out pairs with a smaller sum of gates between them.
    """

    lengths: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    decay: torch.Tensor | None = None
    least: torch.Tensor | None = None

    def restrict(self, kept, i, j, causal):
        """`kept`, a mask that broadcasts to (B, H, n, m), without keys of padding and of other documents.

        i: (n,) positions of the queries, whose documents these are; j: (m,) positions of the keys, the same if not
        causal.
        """
        if self.lengths is not None:
            kept = kept & (j < self.lengths[:, None, None, None])
        if self.documents is not None:  # two tokens share a document if neither is before the start of the other's
            kept = kept & (j >= self.documents[:, None, :, None])
            if not causal:
                kept = kept & (i[:, None] >= self.documents[:, None, None])
        return kept

    @property
    def limits_keys(self):
        """Whether `key_limits` can leave out keys."""
        return self.documents is not None or self.least is not None

    @torch.no_grad()
    def key_limits(self, causal):
        """(first, last), each (B, H or 1, T): a query needs no keys but those at positions first to last, exclusive."""
        first, last = [], []
        if self.documents is not None:
            position = torch.arange(self.documents.size(1), device=self.documents.device)
            end = torch.searchsorted(self.documents.contiguous(), position.repeat(len(self.documents), 1), right=True)
            first, last = [self.documents[:, None]], [end[:, None]]
        if self.least is not None:  # gates are at most 0, so their sums fall, and these rise
            sums = -self.decay.cummin(-1).values
            first.append(torch.searchsorted(sums, sums + self.least))
            last.append(torch.searchsorted(sums, sums - self.least, right=True))
        if causal:
            last = [torch.arange(1, first[0].size(2) + 1, device=first[0].device).expand_as(first[0])]
        return functools.reduce(torch.maximum, first), functools.reduce(torch.minimum, last)


NO_TEXTS = Texts()


class PackedTexts(NamedTuple):
    """`Texts` in the engine's order: (B,), (B, T), (H, B, T, 1), and two key limits, (H, B, T, 1) each; or None."""

    lengths: torch.Tensor | None
    documents: torch.Tensor | None
    decay: torch.Tensor | None
    key_limits: list | None


def with_gates(layer, x, texts, cache=None):
    """`texts` with the sums of the layer's gates for its input x (B, T, C), which continues the text of a `cache`."""
    if not layer.gates:
        return texts
    gate = layer.gate(x)
    decay = gate.to(torch.promote_types(gate.dtype, torch.float32)).cumsum(-1)
    return texts._replace(decay=decay + cache.last_decay() if cache is not None and cache.length else decay)


def decay_between(queries, keys, causal):
    """The sum of log forget gates between queries (..., n) and keys (..., m), whose sums from the first token on these
    are: (..., n, m), at most 0. In a causal model it holds for keys up to the query only."""
    between = queries[..., None] - keys[..., None, :]
    return between if causal else -between.abs()


def document_starts(idx, mark, start=0, before=0):
    """The position at which the document of each token starts, (B, T), where the token `mark` begins a document.

    idx: (B, T) tokens at positions start, start + 1, ...; before: (B, 1) or a number, where the document of the token
    before them starts.
    """
    position = torch.arange(start, start + idx.size(1), device=idx.device)
    return torch.where(idx == mark, position, before).cummax(1).values


def texts_of(config, idx, lengths=None, caches=None):
    """The `Texts` of tokens idx (B, T), by a `GPTConfig`. lengths: (B,) or None.

    caches: of the layers, or None; idx then continues the cached text, and the first one stores the last document.
    """
    if not config.document_mask:
        return Texts(lengths)
    start, before = (caches[0].length, caches[0].document) if caches else (0, 0)
    documents = document_starts(idx, config.document_mark, start, before)
    if caches:
        caches[0].document = documents[:, -1:]
    return Texts(lengths, documents)


def window_starts(tokens, mark, size):
    """Where windows of `size` tokens start if none may begin amid a document that fits one: positions (windows,).

    tokens: (N,) array. A window starts where a document does, and in a longer document at each multiple of `size` too.
    """
    starts = np.union1d([0], np.flatnonzero(tokens[:-1] == mark))  # the last token predicts none
    counts = -(-np.diff(starts, append=len(tokens) - 1) // size)  # windows of each document
    firsts = np.cumsum(counts) - counts
    return np.repeat(starts - firsts * size, counts) + size * np.arange(counts.sum())
