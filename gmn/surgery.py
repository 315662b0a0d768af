"""Remove channels for real: a `KeepMask` over the graph's nodes becomes a smaller network (torch-pruning cuts).

Surgery knows nothing about scores or votes: it takes the network, the graph's structure and a mask.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gmn.address import EdgeSlot
from gmn.errors import PruningError
from gmn.graph import GraphSpec
from gmn.groups import Couplings, KeepMask, couplings
from gmn.trace import evaluation, split_inputs

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SHAPE_FIELDS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(_CONVS, ("in_channels", "out_channels", "groups")),
    **dict.fromkeys(_NORMS, ("num_features",)),
    nn.Linear: ("in_features", "out_features"),
}


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
        PruningError: if the mask does not fit, a module cannot be cut, or the smaller network does not run.
    """
    mask.validate(spec, coupled or couplings(spec))
    smaller = copy.deepcopy(model)
    modules = dict(smaller.named_modules())
    for param, slots in spec.weights().items():
        _cut_layer(modules, param, slots, spec, mask.keep)
    for norm, nodes in {
        s.param.rpartition(".")[0]: s.nodes for s in spec.node_slots if spec.columns[s.column] != "bias"
    }.items():
        if isinstance(modules[norm], _NORMS):
            _cut(tp.prune_batchnorm_out_channels, modules[norm], ~mask.keep[nodes[0] : sum(nodes)])
    for name, parameter in model.named_parameters():
        smaller.get_parameter(name).requires_grad_(parameter.requires_grad)  # torch-pruning makes new ones
    _prove(smaller, example_inputs)
    return smaller


def settled(model: nn.Module, spec: GraphSpec, coupled: Couplings, example_inputs: Any) -> Couplings:
    """The couplings, with those groups frozen whose size is written in the network's code (`view(-1, 1024)`).

    Found by trial: one channel of every group is removed, and if the rest does not run, the groups are bisected.
    """
    free = [g for g in coupled.group[coupled.prunable].unique().tolist() if int((coupled.group == g).sum()) > 1]
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


def _cut_layer(modules: dict[str, nn.Module], param: str, slots: list[EdgeSlot], spec: GraphSpec, keep: Tensor) -> None:
    """Cut the rows and columns of one weight."""
    block = spec.blocks[slots[0].block]
    layer = modules[param.rpartition(".")[0]]
    rows = ~keep[spec.made_by(slots)]
    cols = ~keep[spec.read_by(slots)]
    if isinstance(layer, _CONVS) and block.form == "diagonal":
        _cut(tp.prune_depthwise_conv_out_channels, layer, rows)
    elif isinstance(layer, _CONVS):
        _cut(tp.prune_conv_out_channels, layer, rows)
        _cut(tp.prune_conv_in_channels, layer, cols)
    elif isinstance(layer, nn.Linear):
        _cut(tp.prune_linear_out_channels, layer, rows)
        _cut(tp.prune_linear_in_channels, layer, _features(slots[0], cols))
    elif bool(rows.any()) or bool(cols.any()):
        raise PruningError(f"no surgery for {type(layer).__name__}", where=param)


def _features(slot: EdgeSlot, cols: Tensor) -> Tensor:
    """The input features of a linear layer that belong to some channels: all their positions."""
    _, out, into, taps = slot.canonical_shape
    return slot.restore(cols.view(1, 1, into, 1).expand(1, out, into, taps), (out, into * taps))[0]


def _cut(prune: Callable[..., Any], layer: nn.Module, drop: Tensor) -> None:
    if bool(drop.any()):
        prune(layer, drop.nonzero().flatten().tolist())


def _prove(model: nn.Module, example_inputs: Any) -> None:
    args, kwargs = split_inputs(example_inputs)
    with evaluation(model), torch.no_grad():
        try:
            model(*args, **kwargs)
        except RuntimeError as error:
            message = str(error).strip().split("\n")[0]
            hint = "a size written in its code, such as view(-1, 1024)? flatten(1) follows the channels"
            raise PruningError("the pruned network does not run", got=message, hint=hint) from error


def shapes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Sizes of every layer that surgery can change, by qualified name; with these `resize` rebuilds the network."""
    return {
        name: {field: getattr(module, field) for field in fields}
        for name, module in model.named_modules()
        for kind, fields in SHAPE_FIELDS.items()
        if isinstance(module, kind)
    }


def resize(model: nn.Module, sizes: dict[str, dict[str, int]]) -> nn.Module:
    """Give the layers of a freshly built network the sizes of a pruned one, in place; the values are left undefined.

    Raises:
        PruningError: if a layer is missing or is of a kind that surgery does not change.
    """
    modules = dict(model.named_modules())
    for name, fields in sizes.items():
        module = modules.get(name)
        allowed = next((f for kind, f in SHAPE_FIELDS.items() if isinstance(module, kind)), None)
        if module is None or allowed is None or set(fields) != set(allowed):
            raise PruningError("the saved sizes are for another network", where=name, got=str(fields))
        for field, size in fields.items():
            setattr(module, field, size)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            shape = _resized(module, key, tensor)
            if shape != tuple(tensor.shape):
                empty = tensor.detach().new_zeros(shape)
                setattr(
                    module,
                    key,
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty,
                )
    return model


def _resized(module: nn.Module, key: str, tensor: Tensor) -> tuple[int, ...]:
    if isinstance(module, _CONVS):
        weight = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return weight if key == "weight" else (module.out_channels,)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) if key == "weight" else (module.out_features,)
    assert isinstance(module, _NORMS)
    return (module.num_features,) if tensor.dim() else ()
