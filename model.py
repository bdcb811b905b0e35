"""A GPT, and a classifier made of the same blocks, with any attention mechanism.

With `n_class = 0` the model is a decoder: attention is causal, and every position predicts the next token. With classes
it is an encoder: attention is bidirectional, and the outputs are pooled to one label per text.
`core/base_model.py` holds what GPT shares with the recurrent baseline in bilstm.py.

Letters: B batch, T time, C channels, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from core import checkpoint, kvcache, model_config
from core.base_model import Model
from core.config import UserError, check_choice
from core.inference import sample_next_token
from core.mechanisms import mechanism, new_model, options_of
from core.ngram import NgramEmbedding
from core.ops import drop, rms_norm, rotations
from core.texts import NO_TEXTS, texts_of

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu2": lambda x: F.relu(x).square()}


@dataclass
class GPTConfig:
    block_size: int = 256  # keys that a causal query sees; the longest training text
    vocab_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head heads of queries; 0: n_head
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = False  # in linear layers and LayerNorm
    pos: str = "rope"  # 'rope', 'learned', 'sinusoidal' or 'none'
    norm: str = "rmsnorm"  # 'rmsnorm' or 'layernorm'
    activation: str = "gelu"  # or 'gelu_tanh', GPT-2's approximation; or 'relu2', squared ReLU (So et al. 2021)
    zero_init: bool = False  # output projections start at 0, so that each block starts as the identity
    ngram: int = 0  # the longest n-gram of tokens with an embedding of its own (core/ngram.py); 0: none
    ngram_rows: int = 65536  # of each table of n-grams
    ngram_dim: int = 32  # columns of the tables
    ngram_dropout: float = 0.0  # the share of n-grams whose embeddings are dropped in training
    ngram_sparse: bool = False  # gradients of the tables hold the rows that a batch read; not for sharded models
    tie: bool = True  # a language model's head shares the token embedding's weight
    n_class: int = 0  # 0: a language model
    model: str = "gpt"  # or 'bilstm'
    pool: str = "mean"  # of a classifier's outputs over a text: 'mean', 'max' or 'first'
    document_mask: bool = False  # a token sees its own document only
    document_mark: int | None = None  # the token that begins each document
    attention: str = "dense"  # or the name of a mechanism's file without .py
    qk_norm: bool = False  # normalise the queries and keys of each head: bounded scores, for high learning rates
    attention_sink: bool = False  # a learned logit per head that takes weight which no key deserves
    kernel: str = "auto"  # how attention is computed: see core/kernels.py
    options: dict = field(default_factory=dict)  # of the mechanism and the model, by name

    @property
    def causal(self):
        return self.n_class == 0

    def default_options(self):
        """The default options of the mechanism and the model, by name. Raises UserError for an unknown name."""
        return options_of(self.model, self.attention)

    def check(self):
        """Raise UserError for a value that is unknown or out of range, or two values that do not fit."""
        check_choice("activation", self.activation, ACTIVATIONS)
        model_config.check(self)


class RMSNorm(nn.Module):
    """x / rms(x) (Zhang and Sennrich 2019). It has no gain: the next linear layer can learn it."""

    def forward(self, x):
        return rms_norm(x)


def new_norm(config):
    return RMSNorm() if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config, layer, attention_class):
        super().__init__()
        C = config.n_embd
        self.norm1, self.norm2 = new_norm(config), new_norm(config)
        self.attention = attention_class(config, layer)
        self.up = nn.Linear(C, 4 * C, bias=config.bias)
        self.down = nn.Linear(4 * C, C, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x, rotation=None, texts=NO_TEXTS, cache=None):
        """rotation, texts, cache: see `attention.Attention.forward`."""
        x = x + self.attention(self.norm1(x), rotation, texts, cache)
        y = self.down(self.activation(self.up(self.norm2(x))))
        return x + drop(y, self.dropout if self.training else 0.0)


class GPT(Model):
    """Token embedding, positions, `n_layer` blocks, and a head over V tokens or n_class labels.

    Raises UserError for an invalid config, an unknown option, or a mechanism whose declarations do not hold.
    """

    def __init__(self, config):
        super().__init__(config)
        C, attention_class = config.n_embd, mechanism(config.attention)[0]
        self.embedding = nn.Embedding(config.vocab_size, C)
        if config.ngram:
            self.ngrams = NgramEmbedding(config.ngram, config.ngram_rows, config.ngram_dim, config.vocab_size, C,
                                         config.ngram_dropout, config.ngram_sparse)
        if config.pos == "learned":
            self.positions = nn.Embedding(config.block_size, C)
        self.layers = nn.ModuleList(Block(config, n, attention_class) for n in range(config.n_layer))
        self.norm = new_norm(config)
        self.head = nn.Linear(C, config.n_class or config.vocab_size, bias=not config.causal)
        self.register_buffer("angles", torch.empty(0), persistent=False)
        self.check_attention()
        self.apply(self.init_weights)
        for block in self.layers:  # the residual stream starts with the same size at any depth (GPT-2)
            for weight in (block.attention.proj.weight, block.down.weight):
                nn.init.normal_(weight, std=0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))
        if config.tie and config.causal:
            self.head.weight = self.embedding.weight

    @staticmethod
    def init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def position_table(self, end):
        """Cosines and sines of positions below `end`, (2, end, D / 2); D = C for absolute positions. Cached."""
        if self.angles.numel() == 0 or self.angles.size(1) < end:
            size = self.config.n_embd // (self.config.n_head if self.config.pos == "rope" else 1)
            length = max(self.config.block_size, 2 * end if end > self.config.block_size else 0)
            self.angles = rotations(torch.arange(length), size).float().to(self.embedding.weight.device)
        return self.angles[:, :end]

    def embed(self, idx, texts=NO_TEXTS, cache=None):
        """Embed tokens idx (B, T), which continue the text of the first layer's cache: (x (B, T, C), rotation or None).

        Raises UserError for a position past the block size if positions are absolute.
        """
        start, pos = cache.length if cache else 0, self.config.pos
        end, x = start + idx.size(1), self.embedding(idx)
        if self.config.ngram:
            x = x + self.ngrams(idx, texts.documents, cache)
        if pos == "rope":
            return x, self.position_table(end)[:, start:]
        if pos == "none":
            return x, None
        if end > self.config.block_size:
            raise UserError(f"pos={pos} knows {self.config.block_size} positions (block_size); "
                            f"got a text of {end} tokens")
        if pos == "learned":
            return x + self.positions.weight[start:end], None
        # Vaswani et al. 2017, section 3.5, cosines first; 0.02 sqrt(2) gives them the embedding's standard deviation
        sinusoids = self.position_table(end)[:, start:].permute(1, 0, 2).flatten(1)[:, : self.config.n_embd]
        return x + 0.02 * math.sqrt(2) * sinusoids.to(x.dtype), None

    def forward(self, idx, targets=None, lengths=None, caches=None):
        """Return (logits, loss).

        idx: (B, T) token ids. A language model returns logits (B, T, V) and the mean cross-entropy to targets (B, T) in
        nats, where target -1 is ignored; without targets it returns logits (B, 1, V) of the last position. A classifier
        returns logits (B, n_class) and the loss to targets (B,).
        lengths: (B,) tokens of each text, the rest is padding; None: no padding. caches: from `new_caches`; idx then
        continues the cached text. The loss is None without targets, and never includes `penalty`.
        """
        texts = texts_of(self.config, idx, lengths, caches)
        x, rotation = self.embed(idx, texts, caches[0] if caches else None)
        x = drop(x, self.config.dropout if self.training else 0.0)
        for n, block in enumerate(self.layers):
            x = block(x, rotation, texts, caches[n] if caches else None)
        x = self.norm(x)
        if not self.config.causal:
            x = self.pool(x, lengths)
        elif targets is None:
            x = x[:, -1:]
        logits = self.head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=-1)

    def parameter_groups(self, weight_decay, mask_lr=1.0, ngram_lr=1.0):
        """Parameter groups for an optimizer: weight_decay for matrices, 0 for vectors. The training loop multiplies the
        learning rate by a group's `lr_scale`: mask_lr for the parameters of attention's bias, such as spans, ngram_lr
        for the tables of n-grams, else 1. `sparse` says whether the gradients are sparse tensors.

        Whole tensors and those that FSDP shards (`type(p)`) are in separate groups: fused optimizers do not mix them.
        """
        masks, groups = set(self.mask_parameters()), {}
        tables = set(self.ngrams.tables.parameters()) if self.config.ngram else set()
        for p in self.parameters():
            groups.setdefault((p.dim() >= 2, p in masks, p in tables, type(p)), []).append(p)
        return [{"params": group, "weight_decay": weight_decay * matrices, "sparse": table and self.config.ngram_sparse,
                 "lr_scale": mask_lr if mask else ngram_lr if table else 1.0}
                for (matrices, mask, table, _), group in groups.items()]

    @torch.no_grad()
    def maps(self, idx, lengths=None):
        """The attention weights (B, H, T, T) of each layer for idx (B, T), for pictures. Evaluation mode only."""
        texts, maps = texts_of(self.config, idx, lengths), []
        x, rotation = self.embed(idx, texts)
        for block in self.layers:
            maps.append(block.attention.map(block.norm1(x), rotation, texts))
            x = block(x, rotation, texts)
        return maps

    def estimate_flops(self, T):
        """Floating-point operations to train on one token of a text of T tokens.

        2 per multiply and add, three times the forward pass; attention is counted from each layer's blocks.
        """
        C, layers = self.config.n_embd, self.config.n_layer
        kv = C * (self.config.n_kv_head or self.config.n_head) // self.config.n_head  # channels of keys, and of values
        linear = 2 * C * (5 * C + kv) * layers + (C * self.config.vocab_size if self.config.causal else 0)
        if self.config.ngram:
            linear += self.ngrams.proj.weight.numel()
        pairs = sum(block.attention.multiplied_pairs(T) for block in self.layers)
        return 3 * 2 * (linear + 2 * C * pairs / T)

    def new_caches(self):
        """An empty key-value cache for each layer."""
        return [kvcache.new_cache(block.attention) for block in self.layers]

    @torch.inference_mode()
    def generate_stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Sample max_new_tokens tokens after idx (B, T), T >= 1; yield each as a tensor (B,) when it is drawn.

        temperature, top_k, top_p: see `inference.sample_next_token`.
        Past the block size each token sees the `block_size` positions up to its own; rotary positions keep counting.
        Absolute positions end at the block size: generation then restarts from the last block_size / 2 tokens.
        """
        block_size, absolute = self.config.block_size, self.config.pos in model_config.ABSOLUTE
        caches, text = self.new_caches(), idx
        new = idx[:, -block_size:] if absolute else idx  # tokens that are not in the caches yet
        for _ in range(max_new_tokens):
            if absolute and caches[0].length == block_size:
                caches, new = self.new_caches(), text[:, -max(1, block_size // 2) :]
            logits = self(new, caches=caches)[0][:, -1].float()
            new = sample_next_token(logits, temperature, top_k, top_p, generator)[:, None]
            if absolute:
                text = torch.cat([text[:, -block_size:], new], 1)
            yield new[:, 0]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """idx (B, T) followed by max_new_tokens sampled tokens, (B, T + max_new_tokens); see `generate_stream`."""
        tokens = self.generate_stream(idx, max_new_tokens, temperature, top_k, top_p, generator)
        return torch.cat([idx, *(token[:, None] for token in tokens)], 1)


def load(path, device="cpu", options=None, **changes):
    """(model in evaluation mode, checkpoint) from a file that train.py wrote: see `core.checkpoint.load`."""
    return checkpoint.load(path, GPTConfig, new_model, device, options, **changes)
