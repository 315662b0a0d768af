"""Remove channels for real: a `KeepMask` over the graph's nodes becomes a smaller network.

Surgery knows nothing about scores or votes, and little about layers: the address of every number says which nodes it
belongs to, so a tensor loses the rows and columns whose nodes go. Only the sizes that modules keep beside their
tensors (`out_channels`, `normalized_shape`, ...) have to be known by type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from gmn.errors import MALFORMED, PruningError, of_machine, one_line
from gmn.graph import GraphSpec, group_of
from gmn.groups import Couplings, KeepMask, couplings
from gmn.heads import head_owner, set_heads
from gmn.masks import entries
from gmn.trace import clone, evaluation, split_inputs


def remove(
    model: nn.Module,
    spec: GraphSpec,
    mask: KeepMask,
    example_inputs: Any,
    *,
    coupled: Couplings | None = None,
) -> nn.Module:
    """A copy of the network without the nodes that the mask drops; it has been run once on the example inputs.

    Args:
        model: The network the graph was made from.
        spec: Its graph's structure.
        mask: The nodes that stay.
        example_inputs: What the network is run on to prove that it is whole.
        coupled: Couplings of the graph, if the caller has them.

    Raises:
        PruningError: if the mask does not fit, or the smaller network does not run.
    """
    mask.validate(spec, coupled or couplings(spec))
    smaller = clone(model)
    tensors = {**dict(smaller.named_parameters()), **dict(smaller.named_buffers())}
    kept = entries(spec, {name: tensor.shape for name, tensor in tensors.items()}, mask.keep)
    _replace(smaller, {name: _cut(tensors[name], keep) for name, keep in kept.items() if not bool(keep.all())})
    _shrink_heads(smaller, spec, mask.keep)
    _prove(smaller, example_inputs)
    return smaller


def _shrink_heads(model: nn.Module, spec: GraphSpec, keep: Tensor) -> None:
    for (start, channels), heads in spec.heads:
        owner = head_owner(model, group_of(spec, start).name, heads)
        left = int(keep[start : start + channels].sum()) * heads // channels
        if owner is not None and left < heads:
            set_heads(owner, heads, left, channels // heads)


def _cut(tensor: Tensor, keep: Tensor) -> Tensor:
    """The tensor without the rows, columns, ... of which nothing is kept."""
    for axis in range(tensor.dim()):
        alive = keep.any(dim=[d for d in range(keep.dim()) if d != axis]) if keep.dim() > 1 else keep
        tensor = tensor.detach().index_select(axis, alive.nonzero().flatten().to(tensor.device))
    return tensor


def _replace(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put new tensors into a network, in place; what was shared stays shared."""
    places: dict[int, Tensor] = {}
    for name, new in tensors.items():
        owner, _, key = name.rpartition(".")
        old = getattr(model.get_submodule(owner), key)
        places[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for key, old in own.items():
                if id(old) in places:
                    own[key] = places[id(old)]  # type: ignore[assignment]
        _sync(module)


def _sync(module: nn.Module) -> None:
    """Bring the sizes that a module keeps in line with its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        sample = module.weight if module.affine else module.running_mean
        module.num_features = module.num_features if sample is None else len(sample)
    elif isinstance(module, _ConvNd):
        _sync_conv(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and isinstance(weight, Tensor):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _sync_conv(conv: _ConvNd) -> None:
    first, second = conv.weight.shape[:2]
    if conv.groups == conv.out_channels > 1:  # depthwise
        conv.groups = first
    if isinstance(conv, _ConvTransposeNd):
        conv.in_channels, conv.out_channels = first, second * conv.groups
    else:
        conv.out_channels, conv.in_channels = first, second * conv.groups


def _prove(model: nn.Module, example_inputs: Any) -> None:
    args, kwargs = split_inputs(example_inputs)
    with evaluation(model), _sizes_noted(model), torch.no_grad():
        try:
            model(*args, **kwargs)
        except (*MALFORMED, AssertionError) as error:
            if of_machine(error):
                raise
            hint = "a size written in its code, such as view(-1, 1024)? flatten(1) follows the channels"
            raise PruningError("the pruned network does not run", got=one_line(error), hint=hint) from error


@contextmanager
def _sizes_noted(model: nn.Module) -> Iterator[None]:
    """Instance norms that own no tensor learn from what they read how many channels there are by now."""

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _InstanceNorm)
        module.num_features = args[0].shape[-module._get_no_batch_dim()]

    norms = [m for m in model.modules() if isinstance(m, _InstanceNorm) and not m.affine and m.running_mean is None]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def settled(model: nn.Module, spec: GraphSpec, example_inputs: Any) -> Couplings:
    """A graph's couplings, those groups frozen too whose size is written in the network's code (`view(-1, 1024)`).

    Found by trial: one channel of every group is removed, and if the rest does not run, the groups are bisected.
    """
    coupled = couplings(spec)
    sizes = torch.bincount(coupled.group)
    free = [g for g in coupled.group[coupled.prunable].unique().tolist() if int(sizes[g]) > 1]
    stuck = dict.fromkeys(_stuck(model, spec, coupled, example_inputs, free), "its size is written in the code")
    return dataclasses.replace(coupled, frozen={**coupled.frozen, **stuck}) if stuck else coupled


def _stuck(model: nn.Module, spec: GraphSpec, coupled: Couplings, example_inputs: Any, groups: list[int]) -> list[int]:
    if not groups:
        return []
    keep = torch.ones(coupled.num_channels, dtype=torch.bool)
    keep[[int((coupled.group == g).nonzero()[-1]) for g in groups]] = False
    try:
        remove(model, spec, KeepMask(coupled.nodes(keep)), example_inputs, coupled=coupled)
    except PruningError:
        half = len(groups) // 2
        halves = (groups[:half], groups[half:]) if half else ()
        found = [g for part in halves for g in _stuck(model, spec, coupled, example_inputs, part)]
        return found if half else groups
    return []


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every tensor of a network; with these `resize` gives a freshly built one the same sizes."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def resize(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> nn.Module:
    """Give the tensors of a freshly built network the shapes of a pruned one, in place; their values mean nothing.

    Raises:
        PruningError: if a tensor is missing, or would have other axes or more numbers than the network's own.
    """
    own = model.state_dict(keep_vars=True)
    for name, shape in sizes.items():
        full = list(own[name].shape) if name in own else None
        if full is None or len(full) != len(shape) or not all(0 < n <= m for n, m in zip(shape, full, strict=True)):
            got = f"{list(shape)} for {full}"
            raise PruningError("the saved sizes are for another network", where=name, got=got)
    changed = {name: tuple(shape) for name, shape in sizes.items() if tuple(shape) != tuple(own[name].shape)}
    _replace(model, {name: own[name].detach().new_zeros(shape) for name, shape in changed.items()})
    return model
