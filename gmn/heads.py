"""Where an attention module keeps its number of heads: the one thing about attention that no tensor tells."""

from __future__ import annotations

from torch import nn

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
WIDTHS = ("attn_dim", "all_head_size", "inner_dim")


def head_owner(model: nn.Module, layer: str, heads: int) -> nn.Module | None:
    """The module around a projection that knows how many heads there are; None if heads cannot be taken from it.

    `nn.MultiheadAttention` ties its heads to the width of its input, so they cannot.
    """
    name = layer
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if any(getattr(module, field, None) == heads for field in COUNTS):
            return None if isinstance(module, nn.MultiheadAttention) else module
    return None


def set_heads(owner: nn.Module, before: int, after: int, size: int) -> None:
    """Tell a module that it has fewer heads of `size` channels."""
    for fields, old, new in ((COUNTS, before, after), (WIDTHS, before * size, after * size)):
        for field in fields:
            if getattr(owner, field, None) == old:
                setattr(owner, field, new)
