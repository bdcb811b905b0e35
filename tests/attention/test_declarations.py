"""What a mechanism says of itself is checked when a model is built: each kind of mistake is refused, with a pair of
positions."""

import math

import pytest
import torch

import model as model_file
from attention import Attention
from core import blocks, contract, dist, mechanisms
from core.blocks import Block
from core.config import UserError
from core.inference import convert_for_inference
from model import GPT, GPTConfig
from strangers import AbsoluteKeys, Prefix


class RelativeKeys(AbsoluteKeys):
    relative = True


class RelativePrefix(Prefix):
    relative = True


class RareKeys(Attention):
    """Drops one key position of 500."""

    relative = True

    def bias(self, h, i, j):
        return torch.where(j % 500 == 499, -math.inf, 0.0)


class Window(Attention):
    """Correct: what the classes below spoil."""

    relative = True

    def bias(self, h, i, j):
        return torch.where((i - j).abs() < 9, 0.0, -math.inf)

    def blocks(self, T):
        after = 0 if self.causal else 8
        return [[Block(range(self.n_head), *pair) for pair in blocks.windows(range(T), 16, 8, after)]]


class MissesPairs(Window):
    def blocks(self, T):
        return [[Block(range(self.n_head), *pair) for pair in blocks.windows(range(T), 16, 7, 7)]]


class MissesAHead(Window):
    def blocks(self, T):
        return [[block._replace(heads=range(self.n_head - 1)) for block in super().blocks(T)[0]]]


class HoldsTwice(Window):
    def blocks(self, T):
        return super().blocks(T) * 2


class RowTwice(Window):
    def blocks(self, T):
        half = [[block._replace(keys=block.keys[::2]), block._replace(keys=block.keys[1::2])]
                for block in super().blocks(T)[0]]
        return [[block for pair in half for block in pair if block.keys]]


class OutOfRange(Window):
    def blocks(self, T):
        return [[Block(range(self.n_head), range(T), range(T + 1))]]


class ShortCache(Attention):
    def max_distance(self):
        return 20


class Rows(Attention):
    """Looks at its row's other keys: it is not elementwise."""

    def bias(self, h, i, j):
        return (j - j.max()) * 0.1 * (i >= 0)


class Places(Attention):
    """Counts places in the tensor instead of positions."""

    def bias(self, h, i, j):
        return torch.arange(j.numel()).view(j.shape) * 0.1 * (i >= 0)


class Shapes(Attention):
    def bias(self, h, i, j):
        return torch.zeros(self.n_head, i.size(0), j.size(0))


class Kept(Attention):
    """True and False instead of 0 and -inf."""

    def bias(self, h, i, j):
        return (i - j) < 9


class NotANumber(Attention):
    def bias(self, h, i, j):
        return (i - j - 3).float().sqrt()


class Unguarded(Attention):
    """The logarithm of 0 drops the pair and spoils the gradient."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.length = torch.nn.Parameter(torch.tensor(9.0))

    def bias(self, h, i, j):
        return ((self.length - (i - j).abs()) / 4).clamp(0, 1).log()


@pytest.mark.parametrize("kind, says", [
    (RelativeKeys,
     r"relative = True, but bias depends on more than i - j: at head \d, query \d+, key \d+ it is (0|-inf), "
     r"and (0|-inf)"),
    (RelativePrefix, "leave relative out"),
    (RareKeys, "relative = True, but bias depends on more"),
    (MissesPairs, r"blocks\(600\) misses the kept pair head 0, query (\d+), key \d+; leave blocks out, or mend them"),
    (MissesAHead, r"blocks\(1\) misses the kept pair head 2, query 0, key 0"),
    (HoldsTwice, r"blocks\(1\) holds twice the pair head 0, query 0, key 0"),
    (RowTwice, r"blocks\(7\) names query \d of head 0 twice in one part"),
    (OutOfRange, r"blocks\(1\) names positions range\(0, 2\); expected them from 0 to 0"),
    (ShortCache, r"max_distance\(\) is 20, but head 0, query \d+, key \d+ is kept"),
    (Rows, r"bias is not elementwise: at head \d, query \d+, key \d+ it is .* alone and .* among other pairs"),
    (Places, "bias is not elementwise|must be elementwise"),
    (Shapes, "bias is not elementwise|must be elementwise"),
    (Kept, r"bias must be of floats, 0.0 to keep a pair and -math.inf to drop it; got torch.bool"),
    (NotANumber, r"bias must be a number below infinity; at head 0, query 0, key 0 it is nan"),
    (Unguarded, "the gradient of bias is not finite"),
])
def test_refused(monkeypatch, kind, says):
    """By a whole model, with the mechanism's name first."""
    for module in (mechanisms, model_file):
        monkeypatch.setattr(module, "mechanism", lambda name: (kind, {}))
    config = GPTConfig(n_layer=1, n_head=3, n_embd=24, block_size=600, attention="mine", options={})
    with pytest.raises(UserError, match=f"^mine: .*({says})"):
        GPT(config)


class Gain(Window):
    """A learned gain on the output: a parameter that the bias does not read."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, *inputs):
        return self.gain * super().forward(*inputs)


class Threshold(Attention):
    """A hard window whose length has no gradient from the bias, beside a net that has."""

    relative = True

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.length, self.unused = torch.nn.Parameter(torch.tensor(9.0)), torch.nn.Parameter(torch.zeros(3))
        self.net = torch.nn.Linear(1, 1)

    def bias(self, h, i, j):
        d = i - j
        slope = self.net(d[..., None].to(self.net.weight.dtype))[..., 0]
        return torch.where(d < self.length, -0.01 * d * slope.exp(), -math.inf)


def test_mask_parameters():
    """They are those that the bias reads, with or without a gradient; a gain on the output is none of them."""
    config = GPTConfig(n_layer=1, n_head=3, n_embd=24, block_size=64, kernel="engine")
    gain, threshold = Gain(config), Threshold(config)
    assert gain.mask_parameters() == [] and gain.blocks_of.keys() == set()
    assert blocks.find(gain, 64) is blocks.find(gain, 64)  # constant, so they are found once
    assert type("GainOnly", (Gain,), {"bias": Attention.bias, "blocks": Attention.blocks})(config).dense
    assert [id(p) for p in threshold.mask_parameters()] == [id(p)
                                                            for p in (threshold.length, *threshold.net.parameters())]
    for length in (9.0, 20.0):  # blocks follow a parameter that only the penalty could train
        threshold.double().length.data.fill_(length)
        assert threshold.max_distance() == length - 1
        assert contract.error(threshold, "engine", 64) < 1e-10


def test_a_gain_is_converted_for_inference_and_trains(monkeypatch):
    """It is no part of the mask, whose parameters keep their precision: the model computes in one dtype."""
    for module in (mechanisms, model_file):
        monkeypatch.setattr(module, "mechanism", lambda name: (Gain, {}))
    model, idx = GPT(GPTConfig(n_layer=1, n_head=3, n_embd=24, block_size=64,
                               attention="mine")), torch.zeros(1, 5).long()
    model(idx, idx)[1].backward()
    assert model.layers[0].attention.gain.grad != 0
    assert dist.unsharded_parameters(model) == [model.layers[0].attention.gain]  # FSDP refuses to shard a scalar
    assert convert_for_inference(model, torch.bfloat16)(idx)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [Attention, Window, AbsoluteKeys, Prefix])
def test_accepted(kind, causal):
    """What holds is accepted, and the run's random stream is not touched."""
    before = torch.get_rng_state()
    layer = kind(GPTConfig(n_head=3, n_embd=24, block_size=600, n_class=0 if causal else 2))
    torch.set_rng_state(before)
    contract.check(layer, "mine")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [AbsoluteKeys, Prefix])
def test_what_was_silently_wrong(kind):
    """Absolute key positions, and a prefix that all may see, from a formula alone: once 1.4 and 2.3 off."""
    for causal in (True, False):
        layer = kind(GPTConfig(n_head=3, n_embd=24, block_size=600, n_class=0 if causal else 2,
                               kernel="engine")).double()
        for kernel in ("engine", "flex"):
            assert contract.error(layer, kernel, 200) < 1e-10
