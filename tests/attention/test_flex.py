"""kernel=flex beyond the laws of test_contract.py: dropout, what is compiled, and that the device is not waited for."""

import math

import pytest
import torch
from test_contract import SPANS, Case, random_qkv
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

from core import contract, flex
from core.config import UserError
from core.mechanisms import mechanism
from core.texts import NO_TEXTS, Texts
from strangers import Learned, Squared

SPAN = mechanism("adaptive_attention_span")
ADAPTIVE = Case(SPAN[0], {**SPAN[1], **SPANS}, True)


class NoWaiting(TorchDispatchMode):
    """Refuses operations that a GPU would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [ADAPTIVE, Case(Learned, {}, True), Case(Squared, {}, False)],
                         ids=["spans", "learned", "factor"])
def test_a_gpu_is_not_waited_for(case):
    """Nothing that a training step builds before the kernel asks the device for a value."""
    layer = case.layer(block_size=512)
    layer.train()
    flex.block_mask(layer, 500, flex.score_and_mask(layer, 500, NO_TEXTS)[1],
                    "cpu")  # what no parameter changes is found once
    with NoWaiting():
        texts = Texts(torch.tensor([500, 20]), torch.zeros(2, 500, dtype=torch.long))
        score, mask = flex.score_and_mask(layer, 500, texts)
        flex.block_mask(layer, 500, mask, "cpu", texts)


def test_shapes_stay_the_same_while_spans_move():
    """The block mask of other spans has tensors of the same shapes, so that nothing is compiled again."""
    layer, shapes = ADAPTIVE.layer(block_size=1024), set()
    for shift in (-2.0, 0.0, 2.0):
        layer.span.data += shift
        mask = flex.block_mask(layer, 1000, flex.score_and_mask(layer, 1000, NO_TEXTS)[1], "cpu")
        shapes.add((mask.kv_num_blocks.shape, mask.kv_indices.shape))
    assert shapes == {((1, 3, 8), (1, 3, 8, 8))}


def test_the_block_mask_is_sparse():
    """Short spans leave blocks out: those whose every pair is dropped, and no other."""
    layer = ADAPTIVE.layer(block_size=1024)
    cells, T = flex.cells_of(layer, 1024, "cpu"), 1024
    i = torch.arange(T)
    kept = (layer.bias_at(i, i) > -math.inf).unflatten(1, (8, 128)).unflatten(3, (8, 128)).any(4).any(2)
    assert (cells & ~kept).sum() == 0 and kept.double().mean() < 0.3


@pytest.mark.parametrize("case", [ADAPTIVE, Case(Squared, {}, True)], ids=["spans", "factor"])
def test_dropout(case):
    """Weights are dropped at the rate, the others scaled, independently, the same forward and backward."""
    layer, T = case.layer(block_size=64, dropout=0.25), 60
    layer.train()
    q, k, v = random_qkv(T)

    def attend(v):
        torch.manual_seed(7)
        return flex.attend(layer, q, k, v, dropout=0.25)

    eye = torch.eye(T, dtype=torch.float64).expand(2, 3, T, T).contiguous()
    with contract.flex_on_cpu():
        dropped, plain = attend(eye).detach(), layer.weights(q, k).detach()
        upstream = torch.randn(2, 3, T, 8, dtype=torch.float64)
        grads = torch.autograd.grad(attend(v), (q, v), upstream)
    there = plain > 1e-12
    kept = dropped[there] > 1e-14
    assert kept.double().mean() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped[there][kept], plain[there][kept] / 0.75)
    whole = there.all(0)  # pairs that both examples keep are dropped independently
    both = ((dropped[0] > 1e-14) & (dropped[1] > 1e-14))[whole].double().mean()
    assert both == pytest.approx(0.75**2, abs=0.04)
    mask = torch.where(there, dropped / plain, 0)
    y = (layer.weights(q, k) * mask) @ v
    for found, expected in zip(grads, torch.autograd.grad((y * upstream).sum(), (q, v))):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_dropout_of_heads_and_texts_is_independent():
    """No two heads or texts drop the same pairs, not at shifted positions either."""
    T = 256
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (2, 2, T, T)), indexing="ij")
    dropped = flex.with_dropout(lambda s, *_: s, 0.5, "cpu")(torch.zeros(2, 2, T, T), b, h, i, j).isinf()
    spectrum = torch.fft.rfft(2.0 * dropped.flatten(0, 1).flatten(1) - 1)
    for n, one in enumerate(spectrum):
        for other in spectrum[:n]:
            assert torch.fft.irfft(one * other.conj()).abs().max() / T**2 < 0.03  # of 65,536 shifts by chance: 0.018


def test_compiled_on_a_cpu(monkeypatch):
    """The compiled forward pass agrees with the reference, reads the block mask, and serves many layers and moving
    spans without compiling again; past PyTorch's limit it is refused instead of going dense."""
    torch._dynamo.reset()

    def outputs_only(*inputs, return_aux, **more):  # a CPU has no compiled log-sum-exp
        return flex.compiled()(*inputs, **more), torch_flex.AuxOutput()

    monkeypatch.setattr(flex, "kernel", lambda device: outputs_only)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    for n in range(5):
        layer = ADAPTIVE.layer(block_size=512, dtype=torch.float32)
        layer.span.data += n / 4
        q, k, v = (x.detach() for x in random_qkv(300, D=16, dtype=torch.float32))
        with torch.no_grad():
            torch.testing.assert_close(flex.attend(layer, q, k, v), layer.weights(q, k) @ v, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="raise it, keep to one text length, or use kernel=engine"), torch.no_grad():
        for T in (100, 200, 333):
            kind, options = mechanism("sparse")
            layer = Case(kind, {**options, "window": T // 3}, True).layer(block_size=512, dtype=torch.float32)
            flex.attend(layer, *(x.detach() for x in random_qkv(T, D=16, dtype=torch.float32)))
    torch._dynamo.reset()
    flex.compiled.cache_clear()
