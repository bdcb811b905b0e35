"""The baseline that is no transformer: a BiLSTM for classifiers. python train.py --model=bilstm --attention=additive

    none       the pooled outputs of the BiLSTM (--pool=max)
    additive   one weight for each token, softmax(c . tanh(W h + b)): the context vector of Yang et al. 2016,
               section 2.2, after Bahdanau et al. 2015
    multihead  queries, keys and values among the outputs (Vaswani et al. 2017), then pooled;
               any other mechanism's name puts that in its place

Letters: B batch, T time, C the outputs' channels, hidden of either direction.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from core.config import UserError, check_choice
from core.mechanisms import mechanism, mechanisms
from core.ops import drop, mask_value
from model import GPTConfig, Model

hidden = 128  # channels of each direction

OWN = ("none", "additive")


def options_of(attention):
    """The default options, by name, of a BiLSTM with this attention."""
    check_choice("attention", attention, [*OWN, "multihead", *mechanisms()])
    return {"hidden": hidden} | ({} if attention in OWN else mechanism(mechanism_of(attention))[1])


def mechanism_of(attention):
    return "dense" if attention == "multihead" else attention


class BiLSTM(Model):
    """Embedding -> BiLSTM -> attention -> one summary of each text -> logits. Padding is neither read nor pooled.

    config: of `GPTConfig` vocab_size, n_class, n_layer, n_head, n_embd (the embedding), dropout, bias, pool, attention, kernel.
    """

    def __init__(self, config):
        super().__init__(config)
        for name in ("pos", "norm", "tie"):
            if getattr(config, name) != getattr(GPTConfig, name):
                raise UserError(f"a BiLSTM has no {name}; leave it out, or use model=gpt")
        if config.causal:
            raise UserError("a BiLSTM reads in both directions, the tokens too that a language model is to predict: "
                            "train a classifier, or use model=gpt")
        width = config.options["hidden"]
        C = 2 * width
        if width < 1 or C % config.n_head:
            raise UserError(f"hidden must be at least 1 and 2 hidden a multiple of n_head = {config.n_head}, got {width}")
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embedding.weight, std=0.1)
        sizes = [config.n_embd] + [C] * (config.n_layer - 1)
        self.onward, self.back = (nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes) for _ in range(2))
        self.layers = []
        if config.attention == "additive":
            self.inner, self.context = nn.Linear(C, C), nn.Parameter(torch.randn(C) / C**0.5)
        elif config.attention != "none":
            self.attention = mechanism(mechanism_of(config.attention))[0](replace(config, n_embd=C))
            self.layers = [SimpleNamespace(attention=self.attention)]
            self.check_attention()
        self.head = nn.Linear(C, config.n_class)

    def read(self, idx, lengths):
        """The BiLSTM's outputs (B, T, C).

        What `pack_padded_sequence` gives where a text is, and as if padding were not there; but PyTorch's packed form
        slices its input at each step, so that its backward pass takes ten times as long on a CPU. Here padding comes
        last in both directions, each text turned round for the second, and what is read of it reaches no text.
        """
        x, p = self.embedding(idx), self.config.dropout if self.training else 0.0
        place = torch.arange(idx.size(1), device=idx.device)
        turned = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)[..., None]  # its own inverse
        for onward, back in zip(self.onward, self.back):
            x = drop(x, p)
            found = back(x.gather(1, turned.expand(x.shape)))[0]
            x = torch.cat([onward(x)[0], found.gather(1, turned.expand(found.shape))], 2)
        return x

    def additive(self, x, lengths):
        """The weight of each token, (B, T), from outputs (B, T, C)."""
        padded = torch.arange(x.size(1), device=x.device) >= lengths[:, None]
        return torch.softmax((torch.tanh(self.inner(x)) @ self.context).masked_fill(padded, mask_value(x.dtype)), -1)

    def forward(self, idx, targets=None, lengths=None):
        """idx (B, T) token ids -> logits (B, n_class), and the loss to targets (B,) or None. lengths: (B,) tokens of each text."""
        lengths = whole(idx) if lengths is None else lengths
        x = self.read(idx, lengths)
        if self.config.attention == "additive":
            x = torch.einsum("bt,btc->bc", self.additive(x, lengths), x)
        else:
            x = self.pool(self.attention(x, lengths=lengths) if self.layers else x, lengths)
        logits = self.head(drop(x, self.config.dropout if self.training else 0.0))
        return logits, None if targets is None else F.cross_entropy(logits.float(), targets)

    @torch.no_grad()
    def maps(self, idx, lengths=None):
        """The softmax weights: [(B, H, T, T)], [(B, 1, 1, T)] of additive attention, [] without. Evaluation mode."""
        lengths = whole(idx) if lengths is None else lengths
        if self.config.attention == "none":
            return []
        x = self.read(idx, lengths)
        return [self.attention.map(x, lengths=lengths) if self.layers else self.additive(x, lengths)[:, None, None]]

    def estimate_flops(self, T):
        """Floating-point operations to train on one token of a text of T: see `GPT.estimate_flops`."""
        width, C = self.config.options["hidden"], 2 * self.config.options["hidden"]
        work = sum(2 * 4 * width * ((C if n else self.config.n_embd) + width) for n in range(self.config.n_layer))
        if self.config.attention == "additive":
            work += C * C + 2 * C
        for attention in self.attentions():
            work += 4 * C * C + 2 * C * attention.multiplied_pairs(T) / T
        return 3 * 2 * work


def whole(idx):
    """(B,) lengths of texts (B, T) without padding."""
    return torch.full((len(idx),), idx.size(1), device=idx.device)
