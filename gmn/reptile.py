"""One pruned initialisation for all tasks: Reptile with iterative hard thresholding (Tian et al. 2020; MVP, 5.2).

    theta <- H(theta + step (theta_task - theta))         in every round, for one task of the zoo

theta_task is what some steps of SGD on the task make of theta, with a new head each time. H keeps, of every layer, the
units whose numbers have the largest squares and silences the others: it sets to zero what later layers read them with.
The network then computes what the cut network would (unless a norm mixes channels), and silent units can come back:
what makes them stays and is compared with the others, and the zeros get gradients of an ordinary size.

The other two ways do not do this. A unit that is zero in what makes it and in what reads it has no gradient, and the
first choice of units would be the last. A filter of zeros before a batch norm still puts out the norm's bias, and as
its variance is zero too, its gradient is multiplied by 1 / sqrt(eps), about 300.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gmn.backbone import Backbone
from gmn.costs import training_flops
from gmn.data import Augment, Data, Split
from gmn.errors import DataError
from gmn.filter_pruning import Shrunk
from gmn.graph import GraphSpec
from gmn.groups import KeepMask
from gmn.members import Members
from gmn.progress import track
from gmn.ranking import refuse_whole
from gmn.scores import Norm
from gmn.settings import Fit
from gmn.settings_vote import Reptile
from gmn.surgery import remove
from gmn.tasks import task_data, with_head
from gmn.trace import clone
from gmn.training import Metrics, fit
from gmn.zoo_task import Task


def reptile(
    backbone: Backbone,
    data: Data,
    tasks: Sequence[Task],
    config: Reptile,
    *,
    ratio: float,
    seed: int = 0,
    augment: Augment | None = None,
    log: Callable[[Metrics], None] | None = None,
) -> Shrunk:
    """A sub-network of the backbone from which a few steps lead to a good network for any task.

        theta <- H(theta + step (theta_task - theta))

    It has the backbone's own head, cut: the caller gives it the one of a target (`with_head`) and fine-tunes it. Round
    n draws one of the tasks; its new head and the order of its images have the seed `seed * 10007 + n`, n from 0 on.

    Args:
        backbone: The pre-trained network, which is not changed.
        data: The data set that the tasks' classes are of.
        tasks: What it learns from; the targets must not be among them.
        config: Rounds, and the steps in each.
        ratio: Share of each layer's units that goes, from 0 up to 1.
        seed: Of the tasks' order, their heads and their images.
        augment: Random changes of the images.
        log: Gets the loss, the accuracy and the number of units that came back after each round.

    Raises:
        DataError: if there are no tasks, or a class is none of the data set's.
        PruningError: if nothing can be removed.
        TrainingError: if loss or gradient is NaN or infinite several times in a row.

    Source: H. Tian, B. Liu, X. Yuan, Q. Liu, Meta-Learning with Network Pruning, ECCV 2020. Its code thresholds single
    weights and every 20000 rounds, at a rate that grows, and holds the zeros for three quarters of that time; here it
    is units, after every round, at one rate.
    """
    if not tasks:
        raise DataError("no tasks to learn from", expected="one at least", got="0", hint="plan tasks of split zoo")
    refuse_whole(backbone.coupled)
    order = torch.randint(len(tasks), (config.rounds,), generator=torch.Generator().manual_seed(seed)).tolist()
    meta, flops = _Meta(backbone, ratio), 0.0
    with track("reptile", config.rounds) as advance:
        for number, index in enumerate(order):
            classes = tasks[index].classes
            split, own = task_data(data, classes).train, seed * 10007 + number
            learner = meta.learner(len(classes), own)
            metrics = _learn(learner, split, config, own, augment)
            meta.move(learner, config.step)
            metrics |= {"epoch": number + 1, "returned": meta.threshold()}
            images = config.iterations * min(config.batch_size, len(split))
            flops += training_flops(backbone.model, backbone.example, images)
            advance(f"loss {metrics['loss']:.3g}")
            if log:
                log(metrics)
    smaller = remove(meta.model, backbone.spec, meta.mask, backbone.example, coupled=backbone.coupled)
    return Shrunk(smaller, meta.mask, flops)


def _learn(model: nn.Module, split: Split, config: Reptile, seed: int, augment: Augment | None) -> Metrics:
    """Train on a task, in place; mean loss and accuracy of the steps."""
    metrics: Metrics = {}
    own = config.model_dump(include={"iterations", "lr", "batch_size", "bf16"})
    steps = Fit(epochs=1, **own)
    fit(model, split, steps, seed=seed, augment=augment, title="reptile: a task", log=metrics.update)
    return metrics


class _Meta:
    """theta: a copy of the backbone, and the units that are not silent."""

    def __init__(self, backbone: Backbone, ratio: float) -> None:
        self.backbone, self.model = backbone, clone(backbone.model)
        self.members = Members(backbone.spec, backbone.coupled)
        self.left = backbone.coupled.left_after(ratio)
        self.keep = torch.ones(backbone.coupled.num_channels, dtype=torch.bool)

    @property
    def mask(self) -> KeepMask:
        """The nodes of the units that are not silent."""
        return KeepMask(self.backbone.coupled.nodes(self.keep))

    def learner(self, classes: int, seed: int) -> nn.Module:
        """A copy with a new head, which does not hear the silent units either."""
        learner = with_head(self.model, self.backbone.head, classes, seed=seed)
        self._silence(learner, of_head=True)
        return learner

    def move(self, learner: nn.Module, step: float) -> None:
        """Go a part of the way to the learner: parameters and statistics of norms alike; counters are taken over."""
        ends = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
        with torch.no_grad():
            for name, own in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if self._is_head(name):
                    continue
                if own.is_floating_point():
                    own.lerp_(ends[name], step)
                else:
                    own.copy_(ends[name])

    def threshold(self) -> int:
        """Silence all but the strongest units of each layer; how many of those were silent before."""
        before, state = self.keep, self.model.state_dict()
        # theta has no head: that of the pre-training, perhaps a random one, must not speak for the units that it reads
        counted = {name: torch.zeros_like(value) if self._is_head(name) else value for name, value in state.items()}
        self.keep = _strongest(self.members, Norm().energies(self.members, counted), self.left)
        self._silence(self.model, of_head=False)
        return int((self.keep & ~before).sum())

    def _silence(self, model: nn.Module, *, of_head: bool) -> None:
        """Set to zero what the head, or every other layer, reads silent units with."""
        tensors = dict(model.named_parameters())
        for name, heard in _heard(self.backbone.spec, tensors, self.mask.keep).items():
            if self._is_head(name) == of_head:
                tensors[name].data.mul_(heard.to(tensors[name].device))

    def _is_head(self, name: str) -> bool:
        return name.rpartition(".")[0] == self.backbone.head


def _strongest(members: Members, energies: Mapping[str, Tensor], left: Tensor) -> Tensor:
    """[channels] bool: so many of each group that can be pruned, and all of the others.

    Layer by layer, each by what it reads from units that stay: without training, the same units stay again.
    """
    coupled = members.coupled
    energies, keep = dict(energies), torch.ones(coupled.num_channels, dtype=torch.bool)
    for g in coupled.group[coupled.prunable].unique().tolist():
        own = (coupled.group == g).nonzero().flatten()
        order = members.reduce(members.sums(energies)).cpu()[own].argsort(descending=True, stable=True)
        keep[own[order[int(left[g]) :]]] = False
        for reader in (m for m in members if m.axis == 1 and not bool(keep[m.channel].all())):
            energy = energies[reader.param]
            heard = keep[reader.channel].view(energy.shape[0], 1, -1)
            energies[reader.param] = energy * heard.to(energy)
    return keep


def _heard(spec: GraphSpec, tensors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """Bool that broadcasts to each weight: the entries that read nodes that stay. Depthwise kernels make, not read."""
    heard: dict[str, Tensor] = {}
    for name, slots in spec.weights().items():
        pieces, out, into, taps = slots[0].canonical_shape
        if name in tensors and not (pieces > 1 and out == into == 1):
            columns = keep[spec.read_by(slots)].view(pieces, 1, into, 1).expand(pieces, out, into, taps)
            whole = slots[0].restore(columns, spec.shapes[name])
            # a new head has another number of rows, which are all alike
            heard[name] = whole if whole.shape == tensors[name].shape else whole[:1]
    return heard
