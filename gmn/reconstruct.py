"""After pruning, layer by layer: the weights that are left take over what the removed channels did, by least squares.

For every convolution (without groups) and linear layer, in the order in which they run, with x~ what reaches it in the
smaller network, whose earlier layers are done, and y the outputs of the unpruned layer for the channels that stay:

    min_W  |x~ W - y|^2 + lambda |W - W_0|^2        W_0: the weights after surgery; lambda = RIDGE * mean diag(x~' x~)

Rows of x~ are a layer's inputs at some places of some training images (for a convolution the patch that an output sees,
for a bias a one). No labels and no gradients. The idea is channel pruning's (He, Zhang and Sun 2017, section 3; Luo, Wu
and Lin 2017); here all layers are fitted, also those that lost no input, so that they mend what comes from before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmn.data import Augment, Split
from gmn.distributed import team
from gmn.graph import GraphSpec
from gmn.groups import KeepMask
from gmn.masks import entries
from gmn.progress import track
from gmn.ranking import Pruned
from gmn.trace import evaluation
from gmn.training import generator, recalibrate

ROWS = 40_000  # of a layer, over all images
LEAST = 2  # rows for each unknown of an output; with fewer the images would be learnt by heart
MOST = 10_000  # unknowns of an output: their products are a matrix of 800 MB
RIDGE = 1e-2
BATCH = 250

Rows = tuple[Tensor, Tensor]
"""Of a batch: inputs [R, unknowns], and what is missing in the outputs [R, outputs]."""


def reconstruct(
    model: nn.Module,
    smaller: nn.Module,
    spec: GraphSpec,
    mask: KeepMask,
    split: Split,
    images: int,
    *,
    seed: int = 0,
) -> None:
    """Fit the layers of a pruned network to what they did in the unpruned one, in place.

    Batch norms keep their statistics, which belong to the unpruned outputs. As they are stay layers with groups, that
    run twice, share their weight, or are of a kind of their own, and those with too few images for their size.

    The images are whole: both networks see the same, and nothing is gained by random changes of them (a ResNet-20 at a
    third of its FLOPs lost 1.4 to 2 points).

    Args:
        model: The unpruned network, in which the layers have the same names.
        smaller: What `gmn.surgery.remove` made of it.
        spec, mask: Its graph's structure, and the nodes that stayed.
        split: Training images.
        images: How many of them; for every layer both networks run on them, up to that layer.
    """
    kept = entries(spec, {name: value.shape for name, value in model.named_parameters()}, mask.keep)
    batches = lambda: split.batches(BATCH, generator=generator(seed, 0), limit=images)  # noqa: E731
    places = max(1, ROWS // min(images, len(split)))
    with evaluation(model), evaluation(smaller), torch.no_grad():
        names = [name for name in _in_order(smaller, next(batches())[0][:1]) if f"{name}.weight" in kept]
        with track("fitting layers", len(names)) as advance:
            for name in names:
                stays = kept[f"{name}.weight"].flatten(1).any(1)
                _fit(smaller.get_submodule(name), _rows(model, smaller, name, stays, batches(), places))
                advance(name)


def mend(
    model: nn.Module,
    pruned: Pruned,
    spec: GraphSpec,
    split: Split,
    reconstructed: int,
    recalibrated: int,
    *,
    seed: int,
    augment: Augment | None,
) -> None:
    """What follows surgery, in place: `reconstruct` on so many images, or else `recalibrate` on so many."""
    if reconstructed:
        reconstruct(model, pruned.model, spec, pruned.mask, split, reconstructed, seed=seed)
        team().agree(pruned.model.state_dict().values())
    else:
        recalibrate(pruned.model, split, recalibrated, seed=seed, augment=augment)


def _in_order(model: nn.Module, example: Tensor) -> list[str]:
    """The layers that can be fitted, in the order in which they run."""
    calls: list[str] = []
    shared = Counter(id(value) for layer in model.modules() for value in layer.parameters(recurse=False))
    layers = {name: layer for name, layer in model.named_modules() if _can_be_fitted(layer)}
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda _, args, __, name=name: calls.append(name) if args else None)
            stack.callback(handle.remove)
        model(example)
    return [name for name in calls if calls.count(name) == 1 and shared[id(layers[name].weight)] == 1]


def _can_be_fitted(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _rows(
    model: nn.Module,
    smaller: nn.Module,
    name: str,
    stays: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    places: int,
) -> Iterator[Rows]:
    """Of every batch, at the same random places of both networks."""
    rng = torch.Generator().manual_seed(0)
    layer = smaller.get_submodule(name)
    for images, _ in batches:
        wanted = _at(model.get_submodule(name), model, images)[1]
        reaching, own = _at(layer, smaller, images)
        missing = _channels(layer, wanted)[..., stays.to(images.device)] - _channels(layer, own)
        if isinstance(layer, nn.Conv2d):
            spots = torch.stack([torch.randint(n, (places,), generator=rng) for n in own.shape[2:]], 1).tolist()
            yield _patches(layer, reaching, spots), torch.cat([missing[:, row, column] for row, column in spots])
        else:
            reaching, missing = reaching.flatten(0, -2), missing.flatten(0, -2)
            spots = torch.randperm(len(missing), generator=rng)[: places * len(images)].to(images.device)
            yield reaching[spots], missing[spots]


class _Reached(Exception):
    """The layer has been run: what comes after it is not needed."""


def _at(layer: nn.Module, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches a layer, and what it makes of it."""
    found: list[tuple[Tensor, Tensor]] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((args[0], output))
        raise _Reached

    handle = layer.register_forward_hook(stop)
    try:
        model(images)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError("the layer was run on the first image")


def _channels(layer: nn.Module, output: Tensor) -> Tensor:
    """The output with its channels last."""
    return output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output


def _patches(layer: nn.Conv2d, inputs: Tensor, spots: Sequence[Sequence[int]]) -> Tensor:
    """[spots * images, channels * taps]: what the layer's outputs at these places see."""
    (down, across), (tall, wide) = layer.stride, layer.kernel_size
    steps, (above, left) = layer.dilation, cast("tuple[int, int]", layer.padding)
    padded = F.pad(inputs, (left, left, above, above))
    parts: list[Tensor] = []
    for row, column in spots:
        rows = slice(row * down, row * down + steps[0] * (tall - 1) + 1, steps[0])
        columns = slice(column * across, column * across + steps[1] * (wide - 1) + 1, steps[1])
        parts.append(padded[:, :, rows, columns].flatten(1))
    return torch.cat(parts)


def _fit(layer: nn.Module, pairs: Iterator[Rows]) -> None:
    """Add to weight and bias what the least squares say; nothing if rows are too few or not finite, or too long."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    unknowns = weight[0].numel() + (bias is not None)
    if unknowns > MOST:
        return
    products, count = torch.zeros(unknowns, unknowns + len(weight), dtype=torch.float64), 0
    for inputs, missing in pairs:
        inputs = inputs if bias is None else torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        products += (inputs.T @ torch.cat([inputs, missing], 1)).double().cpu()
        count += len(inputs)
    if count < LEAST * unknowns or not bool(products.isfinite().all()):
        return
    square, right = products[:, :unknowns], products[:, unknowns:]
    square.diagonal().add_(RIDGE * float(square.diagonal().mean()))
    change = torch.linalg.solve(square, right).T.to(weight)  # [outputs, unknowns]
    if bias is not None:
        bias.add_(change[:, -1])
        change = change[:, :-1]
    weight.add_(change.reshape(weight.shape))
