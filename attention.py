"""Multi-head attention defined by one elementwise formula.

A mechanism is a subclass named `Attention` in a file beside this one. It defines

    bias(h, i, j)   added to the score of head h, query position i, key position j: 0 keeps the pair, -inf drops it,
                    a value between is a soft mask

From this formula come the dense reference (`weights`), a blocked CPU kernel (core/engine.py), a FlexAttention kernel
for CUDA (core/flex.py), cached decoding (core/kvcache.py) and pictures. `python attention.py NAME --T=64` draws a
mechanism and checks that they all agree. The class itself is dense attention.

Letters: B batch, T time, C channels, H heads, K key heads, D head size; n queries, m keys.
"""

from core import startup  # first: torch reads its settings when it is loaded

import math
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from core import blocks, kernels, kvcache, ops, sinks
from core.ops import ParameterReads, drop, expand_heads, mask_value, norm_heads, split_heads
from core.texts import NO_TEXTS, decay_between, with_gates


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2).

    If causal, a query sees itself and the `block_size - 1` positions before it, so texts may be longer than a block.
    Otherwise it sees every position. A query without a kept key gives 0, with gradient 0.
    H / K neighbouring heads share keys and values (grouped queries, Ainslie et al. 2023; K = 1: Shazeer 2019).

    config: `GPTConfig`, or what has its fields for attention.
    """

    relative = False  # True: bias depends on i - j only, so blocks may share it
    description = ""  # a line for the start of a run
    first_tokens = 0  # positions that a causal query may see, and the cache holds, beyond block_size and max_distance()
    scope = "row"  # the weights that `factor` ranks among: a query's, or 'matrix': all of one head of one example
    renormalize = True  # whether weights times `factor` are divided by their sum

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        self.block_size, self.causal, self.layer = config.block_size, config.causal, layer
        self.rotary, self.document_mask = config.pos == "rope", config.document_mask
        self.dropout, self.kernel = config.dropout, config.kernel
        self.options = SimpleNamespace(**config.options)
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_size, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm  # see `ops.norm_heads`
        if self.qk_norm:
            self.q_gain, self.k_gain = (nn.Parameter(torch.ones(self.head_size)) for _ in range(2))
        self.sinks = nn.Parameter(torch.zeros(self.n_head)) if config.attention_sink else None
        if type(self).bias is Attention.bias:  # the constant 0
            self.relative = True
        self.blocks_of = {}  # cache of core/blocks.py, core/engine.py and core/flex.py, by T

    # ---- the mechanism: a subclass overrides `bias`, and the other methods only if their defaults do not fit ----

    def bias(self, h, i, j):
        """What is added to the score of head h, query position i, key position j: a floating-point tensor, or a number.

        h, i, j: integer tensors that broadcast against each other. The formula must be elementwise (`self.slopes[h]`,
        `i - j`): it is evaluated for rows, blocks and single pairs. It is differentiable in the mechanism's parameters.
        `total_bias` adds causality and `block_size`.
        """
        return 0.0

    def blocks(self, T):
        """Where to multiply for a text of T tokens: a list of parts, each a list of `blocks.Block`.

        Together the blocks cover each kept pair exactly once; in one part, a query of a head is in at most one block.
        Parts are joined by log-sum-exp. The default is derived from `bias`; override it only for patterns whose best
        shape is not found that way.
        """
        return blocks.derive(self, T)

    def factor(self, p, keys, variation):
        """Elementwise detached factor f on softmax weights p: y = p f / sum(p f), or p f without `renormalize`.

        keys: number of unmasked keys per row; variation: (sigma / mu)^2 of the weights among which p is ranked.
        All three broadcast. The default None leaves weights unchanged.
        """
        return None

    def reweigh(self, p, keys, variation=None):
        """Apply `factor` to complete rows of softmax weights p (..., n, m). Override it only for speed.

        keys: (..., n, 1); variation: (..., n or 1, 1), or None: computed per row.
        """
        return ops.reweigh(p, keys, variation, self.factor, self.renormalize)

    def gate(self, x):
        """Log forget gates (B, H, T), at most 0, of the layer's input x (B, T, C), each from its own token alone.

        A pair's score gets the sum of the gates after its earlier token, up to the later one. The default is none.
        """
        return None

    def least_decay(self, q, k):
        """Per query, (B, H, T): pairs with a smaller sum of gates may be left out. The default None keeps all."""
        return None

    def sink(self):
        """The logit (H,) of one more key per head, whose value is 0 (Xiao et al. 2023, section 3.3; gpt-oss, 2025), or
        None. It scales each row of weights to the sum sigmoid(log-sum-exp of the scores - logit), after `factor`."""
        return self.sinks

    def max_distance(self):
        """The largest distance i - j of a kept pair beyond `first_tokens`, which determines the size of the cache."""
        if not self.relative:
            return self.block_size - 1
        kept = (self.bias_by_offset(self.block_size) > -math.inf).any(0).nonzero()
        return max(0, self.block_size - 1 - int(kept[0])) if len(kept) else 0

    def penalty(self):
        """A term that training adds to the loss: a scalar tensor, or 0."""
        return 0.0

    def stats(self):
        """Statistics by name for logs and plots: numbers, or lists of one number per head."""
        T = self.block_size
        return {"kept_share": self.kept_pairs(T) / (T * (T + 1) / 2 if self.causal else T * T)}

    # ---- derived from the above ----------------------------------------------------------------------------------

    def total_bias(self, h, i, j):
        """`bias`, and -inf where causality or `block_size` drops the pair. h, i, j: see `bias`."""
        bias, distance = self.bias(h, i, j), i - j
        if not self.causal:
            return bias if isinstance(bias, torch.Tensor) else 0.0 * distance + bias
        return torch.where((distance >= 0) & (distance < self.block_size), bias, -math.inf)

    def bias_at(self, i, j, heads=None):
        """`total_bias` at positions i (n,) and j (m,) for `heads` (a range; None: all): (h, n, m), or (1, n, m) if all
        heads share it."""
        heads = range(self.n_head) if heads is None else heads
        h = torch.arange(heads.start, heads.stop, dtype=torch.int32, device=i.device)
        bias = self.total_bias(h[:, None, None], i.int()[:, None], j.int())  # int32 as in FlexAttention: half the bytes
        return bias.expand(bias.size(0) if bias.dim() == 3 else 1, len(i), len(j))

    def bias_by_offset(self, T, future=True):
        """A relative mechanism's bias by offset j - i from 1 - T to T - 1, or 0 without `future`: (H or 1, offsets)."""
        count = 2 * T - 1 if future and not self.causal else T
        j = torch.arange(count, dtype=torch.int32, device=self.proj.weight.device)
        bias = self.bias_at(j[T - 1 : T], j)[:, 0]
        return F.pad(bias, (0, T - 1), value=-math.inf) if future and self.causal else bias

    @cached_property
    def mask_parameter_names(self):
        """The names of the parameters that `bias` reads, also without a gradient, as a hard threshold does."""
        i = torch.arange(2, device=self.proj.weight.device)
        with ParameterReads() as reads:
            self.bias_at(i, i)
        return {name for name, p in self.named_parameters() if id(p) in reads.ids}

    def mask_parameters(self):
        """The parameters that `bias` depends on. Others, such as a gain on the output, do not change the mask."""
        return [p for name, p in self.named_parameters() if name in self.mask_parameter_names]

    @property
    def derives_blocks(self):
        return type(self).blocks is Attention.blocks

    @property
    def reweighs(self):
        return type(self).factor is not Attention.factor

    @property
    def gates(self):
        return type(self).gate is not Attention.gate

    @cached_property
    def dense(self):
        return kernels.is_dense(self)

    def choose_kernel(self, device, dtype=torch.float32, T=0):
        """The name of the kernel that computes this layer: see `kernels.choose_kernel`."""
        return kernels.choose_kernel(self, device, dtype, T)

    def weights(self, q, k, i=None, j=None, texts=NO_TEXTS):
        """The dense reference: reweigh(softmax(q k^T / sqrt(D) + bias)), scaled by the `sink`.

        q: (B, H, n, D) at positions i, k: (B, K, m, D) at positions j (default 0, 1, ...). texts: a `texts.Texts`.
        Returns (B, H, n, m); a row without a kept key is 0.
        """
        i, j = (torch.arange(x.size(2), device=q.device) if at is None else at for x, at in ((q, i), (k, j)))
        bias = sinks.bias_at(self, i, j)
        kept = texts.restrict((bias > -math.inf)[None], i, j, self.causal)
        scores = sinks.scores_at(self, q, expand_heads(k, self.n_head), i, j) + bias.to(q.dtype)
        if texts.decay is not None:  # of the keys; the queries are the last of them
            scores = scores + decay_between(texts.decay[..., -q.size(2) :], texts.decay, self.causal).to(q.dtype)
        scores = scores.masked_fill(~kept, mask_value(q.dtype))
        p = torch.softmax(scores, -1, dtype=q.dtype).masked_fill(~kept, 0)
        if self.reweighs:
            variation = ops.scores_variation(scores, kept, texts) if self.scope == "matrix" else None
            p = self.reweigh(p, kept.sum(-1, keepdim=True), variation)
        return sinks.scale_by_sink(p, scores, self.sink())

    def attend(self, q, k, v, texts=NO_TEXTS):
        """Attention over whole texts (a `texts.Texts`): q (B, H, T, D), and k, v (B, K, T, D) -> (B, H, T, D)."""
        return kernels.attend(self, q, k, v, texts, self.dropout if self.training else 0.0)

    def project(self, x, rotation=None):
        """q (B, H, T, D), and k, v (B, K, T, D), of x (B, T, C)."""
        heads = self.qkv(x).view(*x.shape[:2], -1, self.head_size)  # (B, T, H + 2 K, D)
        if self.qk_norm:
            heads = norm_heads(heads, self.n_head, self.q_gain, self.k_gain)
        return split_heads(heads, self.n_head, rotation)

    def map(self, x, rotation=None, texts=NO_TEXTS):
        """The attention weights (B, H, T, T) of `forward` for x (B, T, C)."""
        return self.weights(*self.project(x, rotation)[:2], texts=with_gates(self, x, texts))

    def forward(self, x, rotation=None, texts=NO_TEXTS, cache=None):
        """x (B, T, C) -> (B, T, C).

        rotation: cosines and sines (2, T, D / 2) of rotary positions (`ops.rotations`), or None.
        texts: padding and documents of x, a `texts.Texts`. cache: a `kvcache.Cache`; x then continues the cached text.
        """
        q, k, v = self.project(x, rotation)
        texts = with_gates(self, x, texts, cache)
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.extend(k, v, texts.decay)
            with torch.autocast(x.device.type, enabled=False):
                y = self.attend(q, k, v, texts)
        else:
            y = kvcache.attend(self, q, k, v, cache, texts)
        return drop(self.proj(y.transpose(1, 2).flatten(2)), self.dropout if self.training else 0.0)

    def multiplied_pairs(self, T):
        """Query-key pairs per head that the blocks compute for a text of T tokens."""
        return sum(block.pairs for part in blocks.find(self, T) for block in part) / self.n_head

    def kept_pairs(self, T):
        """Query-key pairs per head whose bias is not -inf, for a text of T tokens."""
        return blocks.count_kept(self, T)


if __name__ == "__main__":
    from core import pattern

    pattern.show_pattern()
