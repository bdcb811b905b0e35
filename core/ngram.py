"""Embeddings of the last n tokens, hashed into tables: see `NgramEmbedding`.

Letters: B batch, T time, C channels, V vocabulary.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

MULTIPLIER = -0x61C8864680B583EB  # 2^64 / golden ratio, odd, as a signed 64-bit integer: Knuth's multiplicative hash


class NgramEmbedding(nn.Module):
    """The sum over n = 2, ..., `longest` of a projected embedding of the last n tokens (Pagnoni et al. 2024, section
    3.2.1).

    Each n has a table of `rows` x `width`, and an n-gram reads the row of its hash. Tokens before the text, or before
    the document of a token if documents are masked, count as token 0. In training, each embedding of an n-gram is
    dropped as a whole with probability `dropout`, since tables of long n-grams learn a small text by heart. With
    `sparse`, a step costs the rows that it reads and not the whole tables: see `optimizers.adamw`.
    """

    def __init__(self, longest, rows, width, vocab_size, n_embd, dropout=0.0, sparse=False):
        super().__init__()
        self.longest, self.vocab_size, self.dropout = longest, vocab_size, dropout
        self.tables = nn.ModuleList(nn.Embedding(rows, width, sparse=sparse) for _ in range(2, longest + 1))
        self.proj = nn.Linear(width * len(self.tables), n_embd, bias=False)

    def rows(self, text, preceding=None):
        """The rows of the last T tokens of a text (B, longest - 1 + T): a list of (B, T), one for each n.

        preceding: (B, T), how many tokens of its document precede each token; None: all before it.
        """
        T, number, rows = text.size(1) - self.longest + 1, 0, []
        for n in range(self.longest):  # `number` is the n-gram with its tokens as digits, modulo 2^64
            token = text[:, self.longest - 1 - n : self.longest - 1 - n + T].long()
            if preceding is not None:
                token = token.where(preceding >= n, 0)
            number = number * self.vocab_size + token
            if n:
                rows.append((number * MULTIPLIER >> 20) % self.tables[n - 1].num_embeddings)
        return rows

    def forward(self, idx, documents=None, cache=None):
        """idx (B, T) -> (B, T, C). documents: the position at which each token's document starts, (B, T), or None.
        cache: the first layer's; idx then continues the cached text."""
        start = cache.length if cache is not None else 0
        before = cache.tokens if start else idx.new_zeros(idx.size(0), self.longest - 1)
        text = torch.cat([before, idx], 1)
        if cache is not None:
            cache.tokens = text[:, idx.size(1) :]
        preceding = None
        if documents is not None:
            preceding = torch.arange(start, start + idx.size(1), device=idx.device) - documents
        x = torch.stack([table(row) for table, row in zip(self.tables, self.rows(text, preceding))], 2)
        x = F.dropout1d(x.flatten(0, 1), self.dropout, self.training)  # (B T, tables, width)
        return self.proj(x.view(*idx.shape, -1))
