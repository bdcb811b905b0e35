"""A GPT-2 written plainly with GPT-2's names of weights, and the files that nanoGPT and Hugging Face make of one."""

import json
import math
import pickle

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CHARACTERS = sorted("\n !?,.:" + "abcdefghijklmnopqrstuvwxyz" + "é")
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": len(CHARACTERS)}


class Layer(nn.Module):
    def __init__(self, H, C, bias, approximate):
        super().__init__()
        self.H, self.approximate = H, approximate
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias=bias), "c_proj": nn.Linear(C, C, bias=bias)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=bias), "c_proj": nn.Linear(4 * C, C, bias=bias)})

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.H, C // self.H).transpose(1, 2)
                   for y in self.attn["c_attn"](self.ln_1(x)).split(C, 2))
        scores = (q @ k.mT / math.sqrt(C // self.H)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + self.attn["c_proj"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.approximate))


class PlainGPT(nn.Module):
    """idx (B, T) -> logits (B, T, V). Weights are large enough for the forms of GELU to differ."""

    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias=False, approximate="none", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = nn.ModuleList(Layer(n_head, n_embd, bias, approximate) for _ in range(n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(vocab_size, n_embd),
                                          "wpe": nn.Embedding(block_size, n_embd),
                                          "h": layers, "ln_f": nn.LayerNorm(n_embd, bias=bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p) * 0.2)

    def forward(self, idx):
        x = self.transformer["wte"](idx) + self.transformer["wpe"].weight[: idx.size(1)]
        for layer in self.transformer["h"]:
            x = layer(x)
        return self.lm_head(self.transformer["ln_f"](x))


def new_optimizer(net):
    """AdamW with nanoGPT's groups: matrices, then vectors."""
    groups = [[p for p in net.parameters() if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False)]
    return torch.optim.AdamW([{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0))],
                             lr=1e-2)


def step(net, optimizer, idx):
    """A step of training on idx (B, T + 1)."""
    loss = F.cross_entropy(net(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def write_nanogpt(folder, net, shape=SHAPE, prefix="", optimizer=None, **changes):
    """What nanoGPT's train.py saves: the folder of a ckpt.pt."""
    folder.mkdir(exist_ok=True)
    model = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    saved = {"model": model, "optimizer": optimizer.state_dict() if optimizer else {"state": {}, "param_groups": []},
             "model_args": {**shape, "bias": "transformer.ln_f.bias" in net.state_dict(), "dropout": 0.1},
             "iter_num": 7,
             "best_val_loss": torch.tensor(2.5), "config": {"learning_rate": 1e-3, "dataset": "shakespeare_char"}}
    torch.save({**saved, **changes}, folder / "ckpt.pt")
    return folder


def write_data(folder, vocab=CHARACTERS, **changes):
    """What nanoGPT's prepare.py writes: 2-byte tokens and meta.pkl; val has each character once."""
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 20), ("val", 1)):
        np.array(list(range(len(vocab))) * count, np.uint16).tofile(folder / f"{name}.bin")
    itos = dict(enumerate(vocab))
    meta = {"vocab_size": len(vocab), "itos": itos, "stoi": {c: n for n, c in itos.items()}, **changes}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def hugging_face_weights(net):
    """The weights of a GPT2Model: without `transformer.` and the head, (in, out) matrices, and the causal masks."""
    weights = {}
    for name, tensor in net.state_dict().items():
        if name != "lm_head.weight":
            name = name.removeprefix("transformer.")
            weights[name] = (tensor.t() if ".c_" in name and tensor.dim() == 2 else tensor).contiguous()
    for n in range(len(net.transformer["h"])):
        weights[f"h.{n}.attn.bias"] = torch.ones(1, 1, 12, 12).tril().bool()
        weights[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


def write_hugging_face(folder, weights, shape=SHAPE, files=1, **changes):
    """A folder with config.json and model.safetensors, or `files` shards and their index. A change to None drops a
    key."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    sizes = {key: shape[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config = {"model_type": "gpt2", "n_positions": shape["block_size"], "activation_function": "gelu_new",
              "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, **sizes, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    names = {name: f"model-{n % files}.safetensors" if files > 1 else "model.safetensors"
             for n, name in enumerate(weights)}
    for file in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == file}, folder / file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder
