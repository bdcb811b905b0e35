"""What `model.GPT` and `bilstm.BiLSTM` share: options, the mechanisms' checks and penalty, pooling of texts.

Letters: B batch, T time, C channels.
"""

import math

import torch
import torch.nn as nn

from core import contract
from core.config import UserError, did_you_mean


class Model(nn.Module):
    """Base class of models. A subclass sets `layers` and defines `forward`, `estimate_flops` and `maps`.

    config: `GPTConfig`. Its options are filled with the mechanism's defaults. Raises UserError for an invalid value or
    an unknown option.
    """

    def __init__(self, config):
        super().__init__()
        config.check()
        defaults = config.default_options()
        for name in config.options.keys() - defaults.keys():
            raise UserError(f"{config.attention} has no option {name}{did_you_mean(name, defaults)}")
        config.options = {**defaults, **config.options}
        self.config = config

    def attentions(self):
        """The attention mechanism of each layer, in order."""
        return [layer.attention for layer in self.layers]

    def mask_parameters(self):
        """The parameters that the bias of attention depends on, such as spans, of all layers."""
        return [p for attn in self.attentions() for p in attn.mask_parameters()]

    def check_attention(self):
        """Raise UserError if a mechanism's declarations do not hold: see core/contract.py."""
        for attn in self.attentions():
            contract.check(attn, self.config.attention)

    def penalty(self):
        """The mechanisms' term of the loss, summed over layers: a scalar tensor, or 0."""
        return sum(attn.penalty() for attn in self.attentions())

    def pool(self, x, lengths=None):
        """Pool the outputs x (B, T, C) of each text without its padding: (B, C). lengths: (B,), or None: no padding."""
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
