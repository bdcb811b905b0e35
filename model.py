"""A GPT and a classifier from the same blocks, with any attention mechanism in them.

With `n_class = 0` the model is a decoder: causal attention, the next token at every position.
With classes it is an encoder: attention in both directions, pooled to one label per text.
`Model` is what it shares with the baseline that is no transformer, `bilstm.py`.

Letters: B batch, T time, C channels, V vocabulary.
"""

import importlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

import attention
from core import checkpoint, contract, kvcache
from core.config import UserError, check_choice, nearest
from core.inference import sample_next_token
from core.mechanisms import mechanism
from core.ops import accumulate_dtype, drop, rotations

MODELS = ("gpt", "bilstm")


@dataclass
class GPTConfig:
    block_size: int = 256  # tokens a query may see; the longest training text
    vocab_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = False  # in the linear layers and LayerNorm
    pos: str = "rope"  # 'rope', 'learned' or 'sinusoidal'
    norm: str = "rmsnorm"  # 'rmsnorm' or 'layernorm'
    tie: bool = True  # the output layer is the token embedding
    n_class: int = 0  # 0: a language model
    model: str = "gpt"  # one of MODELS
    pool: str = "mean"  # how a classifier sums up a text: 'mean', 'max' or 'first'
    attention: str = "dense"  # 'dense', or a file beside this one without its .py
    kernel: str = "auto"  # how attention is computed: see attention.KERNELS
    options: dict = field(default_factory=dict)  # the mechanism's and the model's own, by name

    @property
    def causal(self):
        return self.n_class == 0

    def default_options(self):
        """The options of the mechanism and the model, by name. Raises UserError for an unknown one."""
        return options_of(self.model, self.attention)

    def check(self):
        """Raise UserError where a value is none of those that exist, or two do not fit."""
        check_choice("pos", self.pos, ("rope", "learned", "sinusoidal"))
        check_choice("norm", self.norm, ("rmsnorm", "layernorm"))
        check_choice("pool", self.pool, ("mean", "max", "first"))
        check_choice("kernel", self.kernel, attention.KERNELS)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_layer > 10_000:  # the Python objects of a million layers fill any memory before their weights do
            raise UserError(f"n_layer must be at most 10,000, got {self.n_layer:,}")
        step = 2 * self.n_head if self.pos == "rope" else self.n_head
        if self.model == "gpt" and self.n_embd % step:
            raise UserError(f"n_embd must be a multiple of {step} (n_head = {self.n_head}, pos = {self.pos}), got {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}")


def options_of(model, attention):
    """The default options, by name, of a kind of model with a mechanism. Raises UserError for an unknown one."""
    check_choice("model", model, MODELS)
    return mechanism(attention)[1] if model == "gpt" else importlib.import_module(model).options_of(attention)


EPSILON = 1e-6  # in RMSNorm: next to the mean square


def normalize(x):
    """(x / rms(x) over the last dimension, 1 / rms(x)): F.rms_norm without a gain, in fewer operations."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulate_dtype(x))
    scale = (length.square_() / x.size(-1)).add_(EPSILON).rsqrt_()
    return (x * scale).to(x.dtype), scale


class Normalize(torch.autograd.Function):
    """`normalize` with its gradient by hand: that of F.rms_norm takes three times as long on a CPU,
    7 % of a training step."""

    @staticmethod
    def forward(ctx, x):
        y, scale = normalize(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y)[..., None]
        return (torch.addcmul(grad, y, along, value=-1 / y.size(-1)) * scale).to(grad.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) (Zhang and Sennrich 2019), without a gain: the next linear layer holds it."""

    def forward(self, x):
        return Normalize.apply(x) if torch.is_grad_enabled() else normalize(x)[0]


def new_norm(config):
    """A normalisation of the configured kind."""
    return RMSNorm() if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class PackedLinear(nn.Module):
    """A linear layer for inference in bfloat16 with its weight in oneDNN's own order, into which a plain one is
    brought at every call: on one token that takes as long again as the product."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    @staticmethod
    def is_supported():
        """Whether oneDNN computes in bfloat16 on this processor (x86: avx512bw or avx_ne_convert); it refuses to pack elsewhere."""
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config, layer, attention_class):
        super().__init__()
        C = config.n_embd
        self.norm1, self.norm2 = new_norm(config), new_norm(config)
        self.attention = attention_class(config, layer)
        self.up = nn.Linear(C, 4 * C, bias=config.bias)
        self.down = nn.Linear(4 * C, C, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x, rotation=None, lengths=None, cache=None):
        x = x + self.attention(self.norm1(x), rotation, lengths, cache)
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + drop(y, self.dropout if self.training else 0.0)


class Model(nn.Module):
    """What all kinds of models share. A kind sets `layers`, whose `attention` is a mechanism, where it has some,
    and defines `forward`, `estimate_flops` and `maps`.

    Raises UserError for a configuration or an option that cannot be.
    """

    def __init__(self, config):
        super().__init__()
        config.check()
        defaults = config.default_options()
        for name in config.options.keys() - defaults.keys():
            raise UserError(f"{config.attention} has no option {name}{nearest(name, defaults)}")
        config.options = {**defaults, **config.options}
        self.config = config

    def attentions(self):
        """The attention mechanisms, one for each layer that has one."""
        return [layer.attention for layer in self.layers]

    def check_attention(self):
        """Raise UserError where a mechanism's declarations do not hold: see contract.py."""
        for each in self.attentions():
            contract.check(each, self.config.attention)

    def penalty(self):
        """The mechanisms' term of the loss, summed over layers: a scalar tensor, or 0."""
        return sum(each.penalty() for each in self.attentions())

    def pool(self, x, lengths=None):
        """(B, T, C) -> (B, C) over each text's own tokens."""
        if self.config.pool == "first":
            return x[:, 0]
        if lengths is None:
            return x.mean(1) if self.config.pool == "mean" else x.amax(1)
        padded = (torch.arange(x.size(1), device=x.device) >= lengths[:, None])[..., None]
        if self.config.pool == "max":
            return x.masked_fill(padded, -math.inf).amax(1)
        return x.masked_fill(padded, 0).sum(1) / lengths[:, None]

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(self, weight_decay):
        """Groups for an optimizer: matrices decay, vectors do not. Sharded and whole tensors are in groups of their own."""
        groups = {}
        for p in self.parameters():
            groups.setdefault((p.dim() >= 2, type(p)), []).append(p)
        return [{"params": part, "weight_decay": weight_decay * matrices} for (matrices, _), part in groups.items()]


class GPT(Model):
    """Token embedding, positions, `n_layer` blocks, and a head over V tokens or n_class labels."""

    def __init__(self, config):
        super().__init__(config)
        C, attention_class = config.n_embd, mechanism(config.attention)[0]
        self.embedding = nn.Embedding(config.vocab_size, C)
        if config.pos == "learned":
            self.positions = nn.Embedding(config.block_size, C)
        self.layers = nn.ModuleList(Layer(config, n, attention_class) for n in range(config.n_layer))
        self.norm = new_norm(config)
        self.head = nn.Linear(C, config.n_class or config.vocab_size, bias=not config.causal)
        self.register_buffer("angles", torch.empty(0), persistent=False)
        self.check_attention()
        self.apply(self.initialise)
        for layer in self.layers:  # so that the residual stream starts with the same size at any depth
            for weight in (layer.attention.proj.weight, layer.down.weight):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer))
        if config.tie and config.causal:
            self.head.weight = self.embedding.weight

    @staticmethod
    def initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def table(self, end):
        """Cosines and sines of positions below `end`: (2, end, D / 2) for rope, D = C else; kept and grown."""
        if self.angles.numel() == 0 or self.angles.size(1) < end:
            size = self.config.n_embd // (self.config.n_head if self.config.pos == "rope" else 1)
            length = max(self.config.block_size, 2 * end if end > self.config.block_size else 0)
            self.angles = rotations(torch.arange(length), size).float().to(self.embedding.weight.device)
        return self.angles[:, :end]

    def embed(self, idx, start=0):
        """Tokens idx (B, T) at positions start, start + 1, ... -> (x (B, T, C), rotation or None).

        Raises UserError where a position lies past what an absolute kind of position knows.
        """
        end, pos = start + idx.size(1), self.config.pos
        x = self.embedding(idx)
        if pos == "rope":
            return x, self.table(end)[:, start:]
        if end > self.config.block_size:
            raise UserError(f"pos={pos} knows {self.config.block_size} positions (block_size); got a text of {end} tokens")
        if pos == "learned":
            return x + self.positions.weight[start:end], None
        # Vaswani et al. 2017, section 3.5, cosines first; 0.02 sqrt(2) gives them the embedding's size
        sinusoids = self.table(end)[:, start:].permute(1, 0, 2).flatten(1)[:, : self.config.n_embd]
        return x + 0.02 * math.sqrt(2) * sinusoids.to(x.dtype), None

    def forward(self, idx, targets=None, lengths=None, caches=None):
        """Logits and loss.

        idx: (B, T) token ids. A language model gives logits (B, T, V) and the mean cross-entropy
        to targets (B, T), where -1 counts for nothing; without targets logits (B, 1, V) of the last
        position. A classifier gives logits (B, n_class) and the loss to targets (B,).
        lengths: (B,) tokens of each text, the rest is padding. caches: from `new_caches`; idx then
        continues the text they hold. The loss is None without targets, and never holds `penalty`.
        """
        x, rotation = self.embed(idx, caches[0].length if caches else 0)
        x = drop(x, self.config.dropout if self.training else 0.0)
        for n, layer in enumerate(self.layers):
            x = layer(x, rotation, lengths, caches[n] if caches else None)
        x = self.norm(x)
        if not self.config.causal:
            x = self.pool(x, lengths)
        elif targets is None:
            x = x[:, -1:]
        logits = self.head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def maps(self, idx, lengths=None):
        """The softmax weights (B, H, T, T) of each layer, as it uses them: for pictures. Evaluation mode."""
        (x, rotation), found = self.embed(idx), []
        for layer in self.layers:
            found.append(layer.attention.map(layer.norm1(x), rotation, lengths))
            x = layer(x, rotation, lengths)
        return found

    def estimate_flops(self, T):
        """Floating-point operations to train on one token of a text of T: 2 per multiply and add,
        three times the forward pass, attention counted from each layer's plan."""
        C, layers = self.config.n_embd, self.config.n_layer
        linear = 12 * C * C * layers + (C * self.config.vocab_size if self.config.causal else 0)
        pairs = sum(layer.attention.multiplied_pairs(T) for layer in self.layers)
        return 3 * 2 * (linear + 2 * C * pairs / T)

    # ---- sampling --------------------------------------------------------------------------

    def for_sampling(self, dtype):
        """Convert the model in place for `stream` (irreversible) and return it: weights in `dtype`; those of linear layers are
        packed in bfloat16 on a CPU, if the processor supports it."""
        masks = [p for layer in self.layers for p in layer.attention.mask_parameters()]
        exact = [p.data for p in masks]
        self.to(dtype).eval().requires_grad_(False)
        for p, data in zip(masks, exact):  # a span rounded to bfloat16 is another mask
            p.data = data
        if dtype == torch.bfloat16 and self.embedding.weight.device.type == "cpu" and PackedLinear.is_supported():
            for parent in list(self.modules()):
                for name, child in parent.named_children():
                    if type(child) is nn.Linear:
                        setattr(parent, name, PackedLinear(child))
        return self

    def new_caches(self):
        return [kvcache.Cache(layer.attention.max_distance() + 1) for layer in self.layers]

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Yield max_new_tokens times the next token of each text, (B,), drawn from the model.

        idx: (B, T) prompt, T >= 1. temperature 0 takes the likeliest; top_k > 0 and top_p < 1 keep
        the k likeliest, and the fewest that hold the share p.

        Past the block size rotary positions go on counting and each token sees the `block_size`
        before it. Absolute positions end there: the text starts again at position 0 with the
        latest half block.
        """
        block, absolute = self.config.block_size, self.config.pos != "rope"
        caches, text = self.new_caches(), idx
        feed = idx[:, -block:] if absolute else idx
        for _ in range(max_new_tokens):
            if absolute and caches[0].length == block:
                caches, feed = self.new_caches(), text[:, -max(1, block // 2) :]
            logits = self(feed, caches=caches)[0][:, -1].float()
            feed = sample_next_token(logits, temperature, top_k, top_p, generator)[:, None]
            if absolute:
                text = torch.cat([text[:, -block:], feed], 1)
            yield feed[:, 0]

    def generate(self, idx, max_new_tokens, **how):
        """idx (B, T) and max_new_tokens more, (B, T + max_new_tokens); see `stream`."""
        return torch.cat([idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **how))], 1)


def new_model(config):
    """The model that a GPTConfig describes. Raises UserError where it cannot be."""
    check_choice("model", config.model, MODELS)
    return GPT(config) if config.model == "gpt" else importlib.import_module(config.model).BiLSTM(config)


def load(path, device="cpu", options=None, **changes):
    """(model in evaluation mode, checkpoint) from a file that train.py wrote: see `core.checkpoint.load`."""
    return checkpoint.load(path, GPTConfig, new_model, device, options, **changes)
