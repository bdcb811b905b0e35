"""GPT-2 as nanoGPT and Hugging Face store it, under the names and shapes of model.py."""

import re

import torch

from core.optimizers import check_tensor
from core.readers import expect, number, record, text

VOCABULARY = 50_257  # byte pairs, and the document mark as the last token
ROWS = 50_304  # of nanoGPT's embedding: some without a token, so that their number is a multiple of 64
TOP = {"wte": "embedding", "wpe": "positions", "ln_f": "norm", "lm_head": "head"}
LAYER = {"ln_1": "norm1", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.proj", "ln_2": "norm2",
         "mlp.c_fc": "up", "mlp.c_proj": "down"}
CONSTANT = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which some files hold as well


def rename(tensors, transposed=False):
    """{name in model.py: float32 tensor} of GPT-2's weights {name: tensor}.

    transposed: linear layers hold (in, out) matrices, as Hugging Face's Conv1D does. Raises ValueError for an unknown
    name, or what is no floating-point tensor.
    """
    weights = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("_orig_mod.").removeprefix("transformer.")  # _orig_mod: of torch.compile
        if CONSTANT.fullmatch(short):
            continue
        check_tensor(name, tensor, None)
        match = re.fullmatch(r"(?:h\.(\d{1,5})\.)?([\w.]+)\.(weight|bias)", short)
        layer, part, kind = match.groups() if match else (None, None, None)
        if part not in (TOP if layer is None else LAYER):
            raise ValueError(f"GPT-2 has no weight {name}")
        new = f"{TOP[part]}.{kind}" if layer is None else f"layers.{int(layer)}.{LAYER[part]}.{kind}"
        weights[new] = (tensor.t() if transposed and ".c_" in short and tensor.dim() == 2 else tensor).float()
    return weights


def cut_rows(weights):
    """The weights without the rows of the embedding and the head that stand for no token."""
    tables = [name for name in ("embedding.weight", "head.weight") if name in weights and weights[name].dim() > 1]
    return {**weights, **{name: weights[name][:VOCABULARY] for name in tables}}


def model_of(weights, shape):
    """(fields of GPTConfig, weights) of GPT-2's weights, renamed. shape: the fields that the weights do not tell.

    The head is added if it is the embedding. Raises ValueError if there is no embedding.
    """
    if "embedding.weight" not in weights:
        raise ValueError("it lacks the token embedding, wte.weight")
    head = weights.get("head.weight", weights["embedding.weight"])
    tie, weights = torch.equal(head, weights["embedding.weight"]), {**weights, "head.weight": head}
    if shape["vocab_size"] == ROWS:
        shape, weights = {**shape, "vocab_size": VOCABULARY}, cut_rows(weights)
    return {**shape, "tie": tie, "bias": "norm.bias" in weights, "pos": "learned", "norm": "layernorm"}, weights


# ---- Hugging Face ------------------------------------------------------------------------------

ACTIVATION = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
         "add_cross_attention": False}  # settings of other models than model.py computes
SIZE = number(1, 2**31, whole=True)
SHAPE = record(dict.fromkeys(("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"), SIZE),
               {"n_inner": SIZE, "activation_function": text(), "resid_pdrop": number(0, 1)})


def shape_of(config):
    """Fields of GPTConfig of Hugging Face's config.json (dict). Raises ValueError or KeyError for another model."""
    expect(config.get("model_type") == "gpt2", "the model_type gpt2", config.get("model_type"))
    SHAPE(config, "it")
    for key, value in FIXED.items():
        expect(config.get(key, value) == value, value, config.get(key), key)
    width = 4 * config["n_embd"]
    expect(config.get("n_inner") in (None, width), width, config.get("n_inner"), "n_inner")
    activation = config.get("activation_function", "gelu_new")
    expect(activation in ACTIVATION, " or ".join(ACTIVATION), activation, "activation_function")
    return {"block_size": config["n_positions"], "activation": ACTIVATION[activation],
            "dropout": float(config.get("resid_pdrop", 0.1)),
            **{key: config[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}}
