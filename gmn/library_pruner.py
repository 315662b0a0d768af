"""torch-pruning's own pruners under our keep rules: what a user would take instead of this package.

Scores are its `GroupMagnitudeImportance` with its defaults: p = 2, mean over the members of a group, divided by the
mean over its channels. Ranking is global, and a step removes about as many channels as one of ours. `prune.keep`,
`limits`, `max_ratio` and `round_to` go for it too; it looks at them before a step, so a layer can end with a little
less than they leave, and with `round_to` layers of fewer channels stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gmn.costs import Cost, cost
from gmn.errors import PruningError, of_machine, one_line
from gmn.graph import GraphSpec
from gmn.groups import Couplings
from gmn.limits import described, floors, kept_whole
from gmn.settings import Prune, Ranking
from gmn.surgery import settled

Pruner = Any  # torch_pruning.pruner.BasePruner
LEAVE_OUT = "leave torch-pruning out of report.baselines"


def library_pruner(
    model: nn.Module, spec: GraphSpec, example_inputs: Any, config: Prune, *, sparse: bool = False
) -> Pruner:
    """A pruner of torch-pruning that changes the model in place.

    Args:
        model: The network.
        spec: Its graph's structure, which says what must stay.
        example_inputs: What torch-pruning follows the channels with.
        config: Steps, what stays whole, and how much of a layer may go.
        sparse: `GroupNormPruner`, whose `regularize` adds to the gradients, with its default strength of 1e-4.

    Raises:
        PruningError: if the network has attention, a pattern matches no layer, or torch-pruning cannot follow it.
    """
    import torch_pruning as tp  # seconds to import, so only for those who ask

    if spec.heads:
        raise PruningError("the rows of torch-pruning do not know attention heads", hint=LEAVE_OUT)
    kind: Any = tp.pruner.GroupNormPruner if sparse else tp.pruner.BasePruner  # `least` below is ours
    coupled = kept_whole(spec, settled(model, spec, example_inputs), config)
    with _one_error():
        pruner = kind(
            model,
            example_inputs,
            tp.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            pruning_ratio=1.0,
            max_pruning_ratio=max([config.max_ratio, *config.limits.values()]),
            iterative_steps=config.steps,
            ignored_layers=_whole_layers(model, spec, coupled),
            round_to=config.round_to if config.round_to > 1 else None,
            in_channel_groups={},  # its own defaults are shared by all pruners, and grow
            out_channel_groups={},
            num_heads={},
        )
    # of its own `pruning_ratio_dict` each entry would be a ranking apart; max_ratio alone it knows itself
    pruner.least = _least(model, spec, coupled, config) if config.limits or config.round_to > 1 else {}
    return pruner


def prune_with(pruner: Pruner, example_inputs: Any, speed_up: float, before: Cost, config: Ranking) -> nn.Module:
    """Step until the network is so many times cheaper than before; the pruner's model, changed in place.

    Args:
        config: The limits that `library_pruner` was given, for the error.

    Raises:
        PruningError: if the target is out of reach, or what is left does not run.
    """
    reached = 1.0
    for _ in range(pruner.iterative_steps):
        with _one_error():
            _leave_alone(pruner)
            pruner.step()
            reached = before.flops / cost(pruner.model, example_inputs).flops
        if reached >= speed_up:
            return pruner.model
    got = f"at most {reached:.2f}x with {described(config)}"
    hint = f"raise prune.max_ratio{' or prune.limits' if config.limits else ''}, lower prune.speed_up, or {LEAVE_OUT}"
    raise PruningError("torch-pruning cannot reach the speed-up", expected=f"{speed_up:g}x", got=got, hint=hint)


@contextmanager
def _one_error() -> Iterator[None]:
    """Whatever the library raises, as one error of ours."""
    try:
        yield
    except Exception as error:  # it raises whatever it met on its way
        if of_machine(error):
            raise
        raise PruningError("torch-pruning cannot follow the network", got=one_line(error), hint=LEAVE_OUT) from error


def _whole_layers(model: nn.Module, spec: GraphSpec, coupled: Couplings) -> list[nn.Module]:
    """The layers with outputs that must stay."""
    stays = ~coupled.prunable
    return [
        model.get_submodule(param.rpartition(".")[0])
        for param, slots in spec.weights().items()
        if bool(stays[coupled.channel[spec.made_by(slots)]].any())
    ]


def _least(model: nn.Module, spec: GraphSpec, coupled: Couplings, config: Prune) -> dict[nn.Module, int]:
    """How many channels of each layer must stay."""
    least, found = floors(spec, coupled, config), {}
    for param, slots in spec.weights().items():
        groups = coupled.group[coupled.channel[spec.made_by(slots)]].unique()
        found[model.get_submodule(param.rpartition(".")[0])] = int(least[groups].sum())
    return found


def _leave_alone(pruner: Pruner) -> None:
    """From now on ignore the layers that would have too few channels with one less, or with one multiple less."""
    multiple = pruner.round_to or 1
    for layer, least in pruner.least.items():
        fewer = (pruner.DG.get_out_channels(layer) - 1) // multiple * multiple
        if fewer < least and layer not in pruner.ignored_layers:
            pruner.ignored_layers.append(layer)
