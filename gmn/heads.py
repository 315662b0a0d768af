"""Where an attention module keeps its number of heads: the one thing about attention that no tensor tells."""

from __future__ import annotations

from collections.abc import Mapping

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


def head_counts(model: nn.Module) -> dict[str, int]:
    """How many heads each module says that it has, by its name: what shapes of tensors do not tell."""
    counts = {}
    for name, module in model.named_modules():
        own = [getattr(module, field, None) for field in COUNTS]
        count = next((value for value in own if type(value) is int and value > 0), None)
        if count is not None and not isinstance(module, nn.MultiheadAttention):
            counts[name] = count
    return counts


def restore_heads(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Tell the modules of a freshly built network how many heads a pruned one has; larger counts are left out."""
    for name, before in head_counts(model).items():
        after, owner = counts.get(name, before), model.get_submodule(name)
        if type(after) is int and 0 < after < before:
            width = next((getattr(owner, field) for field in WIDTHS if hasattr(owner, field)), 0)
            set_heads(owner, before, after, width // before)


def set_heads(owner: nn.Module, before: int, after: int, size: int) -> None:
    """Tell a module that it has fewer heads of `size` channels."""
    for fields, old, new in ((COUNTS, before, after), (WIDTHS, before * size, after * size)):
        for field in fields:
            if getattr(owner, field, None) == old:
                setattr(owner, field, new)
