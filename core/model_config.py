"""Which values a `model.GPTConfig` may have."""

from core.config import UserError, check_choice
from core.kernels import KERNELS

ABSOLUTE = ("learned", "sinusoidal")  # positions that end at the block size
OF_THE_RUN = ("dropout", "ngram_dropout", "ngram_sparse", "kernel")  # fields that each run takes from its settings


def check(config):
    """Raise UserError for a value that is unknown or out of range, or two values that do not fit."""
    check_choice("pos", config.pos, ("rope", *ABSOLUTE, "none"))
    check_choice("norm", config.norm, ("rmsnorm", "layernorm"))
    check_choice("pool", config.pool, ("mean", "max", "first"))
    check_choice("kernel", config.kernel, KERNELS)
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.n_kv_head < 0 or config.n_kv_head and config.n_head % config.n_kv_head:
        raise UserError(f"n_kv_head must divide n_head = {config.n_head} (0: n_head), got {config.n_kv_head}")
    if config.n_layer > 10_000:  # the Python objects of a million layers fill any memory before their weights do
        raise UserError(f"n_layer must be at most 10,000, got {config.n_layer:,}")
    step = 2 * config.n_head if config.pos == "rope" else config.n_head
    if config.model == "gpt" and config.n_embd % step:
        raise UserError(f"n_embd must be a multiple of {step} (n_head = {config.n_head}, pos = {config.pos}), "
                        f"got {config.n_embd}")
    if config.document_mask and config.document_mark is None:
        raise UserError("document_mask expects data whose documents begin with a mark; this data has none")
    if config.document_mask and config.model != "gpt":
        raise UserError(f"document_mask expects model=gpt, got {config.model}, which reads each text as a whole")
    if not (config.ngram == 0 or 2 <= config.ngram <= 16):
        raise UserError(f"ngram must be 0 or from 2 to 16, got {config.ngram}")
    for name in ("ngram_rows", "ngram_dim"):
        if not 1 <= getattr(config, name) <= 2**26:
            raise UserError(f"{name} must be from 1 to 2**26, got {getattr(config, name)}")
    if config.ngram and config.model != "gpt":
        raise UserError(f"ngram expects model=gpt, got {config.model}")
    for name in ("dropout", "ngram_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {getattr(config, name)}")
