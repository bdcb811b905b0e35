"""The recurrent baseline: a BiLSTM classifier. python train.py --model=bilstm --attention=additive

    none       the pooled outputs of the BiLSTM (--pool=max)
    additive   one weight per token, softmax(c . tanh(W h + b)): the context vector of Yang et al. 2016,
               section 2.2, after Bahdanau et al. 2015
    multihead  dense multi-head attention over the outputs (Vaswani et al. 2017), then pooled;
               the name of any other mechanism selects that mechanism instead

Letters: B batch, T time, C channels of the outputs, `hidden` per direction.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from core.base_model import Model
from core.config import UserError, check_choice
from core.mechanisms import mechanism, mechanisms
from core.ops import drop, mask_value
from core.texts import Texts
from model import GPT, GPTConfig

hidden = 128  # channels of each direction

BUILT_IN = ("none", "additive")  # attention of this file


def options_of(attention):
    """The default options, by name, of a BiLSTM with this attention. Raises UserError for an unknown name."""
    check_choice("attention", attention, [*BUILT_IN, "multihead", *mechanisms()])
    return {"hidden": hidden} | ({} if attention in BUILT_IN else mechanism(mechanism_name(attention))[1])


def mechanism_name(attention):
    return "dense" if attention == "multihead" else attention


class BiLSTM(Model):
    """Embedding, BiLSTM, attention, pooling, logits. Padding is neither read nor pooled.

    config: `GPTConfig`; pos, norm, activation and tie must keep their defaults, n_embd is the size of the embedding.
    Raises UserError for a value that a BiLSTM cannot have.
    """

    parameter_groups = GPT.parameter_groups

    def __init__(self, config):
        super().__init__(config)
        for name in ("pos", "norm", "activation", "tie"):
            if getattr(config, name) != getattr(GPTConfig, name):
                raise UserError(f"a BiLSTM has no {name}; leave it out, or use model=gpt")
        if config.causal:
            raise UserError("a BiLSTM reads in both directions, so it sees the tokens that a language model predicts: "
                            "train a classifier, or use model=gpt")
        width = config.options["hidden"]
        C = 2 * width
        if width < 1 or C % config.n_head:
            raise UserError(f"hidden must be at least 1, and 2 hidden a multiple of n_head = {config.n_head}, "
                            f"got {width}")
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embedding.weight, std=0.1)
        sizes = [config.n_embd] + [C] * (config.n_layer - 1)
        self.onward, self.back = (nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes)
                                  for _ in range(2))
        self.layers = []
        if config.attention == "additive":
            self.inner, self.context = nn.Linear(C, C), nn.Parameter(torch.randn(C) / C**0.5)
        elif config.attention != "none":
            self.attention = mechanism(mechanism_name(config.attention))[0](replace(config, n_embd=C))
            self.layers = [SimpleNamespace(attention=self.attention)]
            self.check_attention()
        self.head = nn.Linear(C, config.n_class)

    def read(self, idx, lengths):
        """The BiLSTM's outputs (B, T, C) for idx (B, T), lengths (B,). Outputs at padding are meaningless.

        They equal those of `pack_padded_sequence`, whose backward pass takes ten times as long on a CPU because it
        slices its input at each step. Here each text is reversed within its length, so padding comes last in both
        directions.
        """
        x, p = self.embedding(idx), self.config.dropout if self.training else 0.0
        position = torch.arange(idx.size(1), device=idx.device)
        reverse = torch.where(position < lengths[:, None], lengths[:, None] - 1 - position, position)[..., None]
        for onward, back in zip(self.onward, self.back):
            x = drop(x, p)
            y = back(x.gather(1, reverse.expand(x.shape)))[0]
            x = torch.cat([onward(x)[0], y.gather(1, reverse.expand(y.shape))], 2)
        return x

    def additive(self, x, lengths):
        """The weight of each token, (B, T), from outputs x (B, T, C); 0 at padding."""
        padded = torch.arange(x.size(1), device=x.device) >= lengths[:, None]
        scores = torch.tanh(self.inner(x)) @ self.context
        return torch.softmax(scores.masked_fill(padded, mask_value(x.dtype)), -1)

    def forward(self, idx, targets=None, lengths=None):
        """Return (logits (B, n_class), loss) for token ids idx (B, T).

        targets: (B,) labels; None: the loss is None. lengths: (B,) tokens of each text, the rest is padding; None: no
        padding.
        """
        lengths = whole(idx) if lengths is None else lengths
        x = self.read(idx, lengths)
        if self.config.attention == "additive":
            x = torch.einsum("bt,btc->bc", self.additive(x, lengths), x)
        else:
            x = self.pool(self.attention(x, texts=Texts(lengths)) if self.layers else x, lengths)
        logits = self.head(drop(x, self.config.dropout if self.training else 0.0))
        return logits, None if targets is None else F.cross_entropy(logits.float(), targets)

    @torch.no_grad()
    def maps(self, idx, lengths=None):
        """The attention weights, for pictures: [(B, H, T, T)], or [(B, 1, 1, T)] of additive attention, or []."""
        lengths = whole(idx) if lengths is None else lengths
        if self.config.attention == "none":
            return []
        x = self.read(idx, lengths)
        return [self.attention.map(x, texts=Texts(lengths)) if self.layers
                else self.additive(x, lengths)[:, None, None]]

    def estimate_flops(self, T):
        """Floating-point operations to train on one token of a text of T: see `GPT.estimate_flops`."""
        width, C = self.config.options["hidden"], 2 * self.config.options["hidden"]
        work = sum(2 * 4 * width * ((C if n else self.config.n_embd) + width) for n in range(self.config.n_layer))
        if self.config.attention == "additive":
            work += C * C + 2 * C
        for attn in self.attentions():
            work += 2 * C * (C + attn.n_kv_head * attn.head_size) + 2 * C * attn.multiplied_pairs(T) / T
        return 3 * 2 * work


def whole(idx):
    """(B,) lengths of texts (B, T) without padding."""
    return torch.full((len(idx),), idx.size(1), device=idx.device)
