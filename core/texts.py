"""The texts of a batch as attention sees them: their padding and their documents.

Letters: B batch, T time, H heads; n queries, m keys.
"""

from typing import NamedTuple

import numpy as np
import torch


class Texts(NamedTuple):
    """Which pairs of a batch are dropped besides those of the mechanism's bias; a field that is None drops none.

    lengths: (B,) tokens of each example; the rest is padding.
    documents: (B, T) the position at which each token's document starts. A token sees its own document only.
    """

    lengths: torch.Tensor | None = None
    documents: torch.Tensor | None = None

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

    def repeat(self, count):
        """Each example `count` times in a row."""
        return self._make(x if x is None else x.repeat_interleave(count, 0) for x in self)

    def key_limits(self):
        """(first, last): each query's document is at the positions from first (B, T) to last (B, T), exclusive."""
        position = torch.arange(self.documents.size(1), device=self.documents.device)
        return self.documents, torch.searchsorted(self.documents, position.repeat(len(self.documents), 1), right=True)


NO_TEXTS = Texts()


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
