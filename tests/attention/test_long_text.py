"""A text of 20 times the block size: first tokens that stay visible are still read, and dropped ones are missed.

python -m pytest -s tests/attention/test_long_text.py prints the figures of docs/mechanisms.md.
"""

import math

import torch

from model import GPT, GPTConfig

BLOCK, WINDOW, SLOTS, VALUES = 64, 8, 4, 8


def texts(B, T, generator):
    """(tokens (B, T), targets): each text begins with a value for each of 4 slots; noise follows, and every 16 tokens a
    query for one slot, whose answer is the target. The last answer lies outside the window."""
    tokens = torch.randint(32, 48, (B, T), generator=generator)
    values = torch.randint(VALUES, (B, SLOTS), generator=generator) + VALUES * torch.arange(SLOTS)
    tokens[:, :SLOTS] = values
    asked = torch.arange(8, T - 1, 16)
    slots = torch.randint(SLOTS, (B, len(asked)), generator=generator)
    tokens[:, asked], tokens[:, asked + 1] = 48 + slots, values.gather(1, slots)
    targets = torch.full_like(tokens, -1)
    targets[:, asked] = values.gather(1, slots)
    return tokens, targets


def train(steps=150):
    torch.manual_seed(0)
    options = {"sparse_pattern": "local", "window": WINDOW, "global_tokens": SLOTS}
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=52, n_layer=1, n_head=2, n_embd=32, attention="sparse",
                          options=options))
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(*texts(32, BLOCK, generator))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def losses(model, tokens, targets, **options):
    """The mean loss of the first block and of the last, in nats per answer, with other options of the mechanism."""
    other = GPT(GPTConfig(**{**vars(model.config), "options": {**model.config.options, **options}})).eval()
    other.load_state_dict(model.state_dict())
    loss = torch.nn.functional.cross_entropy(other(tokens, targets)[0].flatten(0, 1), targets.flatten(),
                                             ignore_index=-1, reduction="none")
    loss, counts = loss.view(targets.shape), (targets >= 0)
    return [loss[:, part].sum().item() / counts[:, part].sum().item() for part in (slice(BLOCK), slice(-BLOCK, None))]


def test_a_long_text_keeps_its_loss():
    """Chance is log(8) = 2.08 nats, by the slot alone."""
    model = train()
    tokens, targets = texts(8, 20 * BLOCK, torch.Generator().manual_seed(2))
    kept, dropped = losses(model, tokens, targets), losses(model, tokens, targets, global_tokens=0)
    print(f"\nfirst block, last of 20: kept {kept[0]:.4f}, {kept[1]:.4f}; "
          f"dropped {dropped[0]:.4f}, {dropped[1]:.4f} nats")
    assert max(kept) < 0.1 and kept[1] < kept[0] + 0.05
    assert dropped[1] > math.log(VALUES)
