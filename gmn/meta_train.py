"""Meta-training: the metanetwork learns to make networks easy to prune (GMN, section 3).

One step: pick a data model; network -> graph -> metanetwork -> graph -> new parameters; accuracy loss over a big
batch (cross-entropy, and distillation from the data model if asked for) plus sparsity loss on the new parameters. The
metanetwork runs forward and backward once per step, however many mini-batches there are: the gradients with respect to
the new parameters are summed first (equal by linearity).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer

from gmn.bookmark import Bookmark
from gmn.data import Augment, Split
from gmn.distributed import ALONE, Team, team
from gmn.fit_options import Batch, answer, distilled
from gmn.graph import NetworkGraph
from gmn.guard import Pieces
from gmn.meta_shares import Shares, shares_of
from gmn.metanetwork import MetaNetwork
from gmn.phases import Phase, untimed
from gmn.replicas import averaged_over_processes
from gmn.settings import MetaTrain
from gmn.training import Metrics, generator, make_optimizer, make_schedule, run_epochs

TITLE = "meta-training"
STEP = ("pruner_reg", "scale_invariant", "distill", "temperature", "bf16", "channels_last")  # of the recipe, in a step


class Sparsity(Protocol):
    """What has a sparsity loss: `gmn.Importance` of channels, `gmn.weight_masks.WeightSparsity` of single weights."""

    def sparsity_loss(self, state: Mapping[str, Tensor], *, scale_invariant: bool = False) -> Tensor:
        """A scalar, differentiable in the parameters."""
        ...


@dataclass(frozen=True)
class Lesson:
    """What is learnt from on a data model: images, their random changes, the weight of the sparsity loss."""

    split: Split
    augment: Augment | None
    pruner_reg: float


@dataclass(frozen=True)
class DataModel:
    """A network to learn on, with what stays the same over all steps: its graph and the scores' bookkeeping.

    `lesson`: None, if it is that of the training.
    """

    model: nn.Module
    graph: NetworkGraph
    importance: Sparsity
    lesson: Lesson | None = None


Item = list[tuple[DataModel, list[Batch]]]  # what a process does in a step


def meta_step(
    metanetwork: MetaNetwork,
    subject: DataModel,
    batches: Sequence[Batch],
    *,
    pruner_reg: float,
    scale_invariant: bool = False,
    distill: float = 0.0,
    temperature: float = 4.0,
    bf16: bool = False,
    channels_last: bool = False,
    phase: Phase = untimed,
    crew: Team = ALONE,
    pieces: Pieces | None = None,
) -> Metrics:
    """Leave the gradient of (accuracy loss + pruner_reg * sparsity loss) in the metanetwork's parameters.

    Args:
        metanetwork: Rewrites the data model's weights.
        subject: The data model; its batch norms use their own running statistics (eval mode).
        batches: The big batch as mini-batches of normalised images and labels.
        pruner_reg: Weight of the sparsity loss.
        scale_invariant: Differentiate the normaliser of the sparsity loss too.
        distill: Share of the accuracy loss that is distillation from the data model with its own weights; the rest
            is cross-entropy.
        temperature: Of the distillation, see `gmn.fit_options.divergence`.
        bf16, channels_last: How the new network reads the images.
        phase: Times the parts of the step.
        crew: The processes that have a share of the big batch each; the gradient is that of all of it.
        pieces: How mini-batches are cut where memory is short; the gradient is the same, to rounding.

    Returns:
        Losses, accuracy, and the norms of both gradients with respect to the new parameters.
    """
    with phase("metanetwork forward"):
        new = metanetwork(subject.graph).to_state_dict()
    leaves = {name: value.detach().requires_grad_() for name, value in new.items()}
    with phase("accuracy"):
        options = {"distill": distill, "temperature": temperature, "bf16": bf16, "channels_last": channels_last}
        parts = [part for batch in batches for part in pieces.cut(batch)] if pieces else batches
        metrics = _accuracy_gradient(subject.model, leaves, parts, crew, **options)
    with phase("sparsity"):
        sparsity = subject.importance.sparsity_loss(leaves, scale_invariant=scale_invariant)
        sparsity_gradient = torch.autograd.grad(pruner_reg * sparsity, list(leaves.values()), allow_unused=True)
    norms = {
        "accuracy_gradient": _norm(leaf.grad for leaf in leaves.values()),
        "sparsity_gradient": _norm(sparsity_gradient),
    }
    with phase("metanetwork backward"):
        total = [_sum(leaf, gradient) for leaf, gradient in zip(leaves.values(), sparsity_gradient, strict=True)]
        torch.autograd.backward(list(new.values()), total)
    return metrics | {"sparsity": sparsity.item(), **norms, **(pieces.metrics if pieces else {})}


def _accuracy_gradient(
    model: nn.Module,
    leaves: dict[str, Tensor],
    batches: Sequence[Batch],
    crew: Team,
    *,
    distill: float,
    temperature: float,
    bf16: bool,
    channels_last: bool,
) -> Metrics:
    """Sum the gradients of the mean accuracy loss over the mini-batches in the leaves."""
    images = round(crew.total(sum(len(labels) for _, labels in batches))[0])
    loss, right = 0.0, 0
    for inputs, labels in batches:
        if channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            logits = functional_call(model, leaves, (inputs,))
        part = F.cross_entropy(logits.float(), labels, reduction="sum") / images
        if distill:
            part = distilled(part, logits, answer(model, inputs, bf16), distill, temperature, images)
        part.backward()
        loss += part.item()
        right += int((logits.detach().argmax(1) == labels).sum())
    if crew.size > 1:
        for leaf in leaves.values():  # a process without images has no gradients yet
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        crew.add_up(leaf.grad for leaf in leaves.values() if leaf.grad is not None)
    loss, right = crew.total(loss, right)
    return {"loss": loss, "accuracy": right / images}


def _sum(leaf: Tensor, gradient: Tensor | None) -> Tensor:
    """The gradient of both losses, in place of that of the accuracy loss."""
    if leaf.grad is None or gradient is None:
        return next((g for g in (leaf.grad, gradient) if g is not None), torch.zeros_like(leaf))
    return leaf.grad.add_(gradient)


def _norm(gradients: Iterable[Tensor | None]) -> float:
    return float(sum((g.double() ** 2).sum() for g in gradients if g is not None) ** 0.5)


def train_metanetwork(
    metanetwork: MetaNetwork,
    subjects: Sequence[DataModel],
    split: Split,
    config: MetaTrain,
    *,
    seed: int = 0,
    augment: Augment | None = None,
    start: int = 0,
    optimizer: Optimizer | None = None,
    log: Callable[[Metrics], None] | None = None,
    after_epoch: Callable[[int, Optimizer], bool | None] | None = None,
    bookmark: Bookmark | None = None,
) -> None:
    """Train a metanetwork in place: `config.epochs` epochs of `config.steps_per_epoch` steps.

    Args:
        subjects: The data models; each step draws `config.models` of them, each with its share of the mini-batches.
        split, augment: The training images and their changes, of data models without a lesson of their own.
        start, optimizer: First epoch and restored optimizer, when a run is resumed.
        after_epoch: Called with the epoch and the optimizer, to save a checkpoint; True stops the training.
        bookmark: Where an epoch that takes long is kept, and goes on from.
    """
    for subject in subjects:
        subject.model.eval()
    optimizer = optimizer or make_optimizer(metanetwork, config)
    schedule = make_schedule(optimizer, config, config.steps_per_epoch, done=start * config.steps_per_epoch)
    plan = shares_of(config, team())
    team().agree(metanetwork.state_dict().values())

    pieces = Pieces(TITLE, config.batch_size)

    def batches(epoch: int) -> Iterator[Item]:
        return _items(subjects, split, config, plan, augment, generator(seed, epoch))

    def step(item: Item) -> Metrics:
        return _step(metanetwork, item, config, plan, pieces)

    def save(epoch: int) -> bool | None:
        team().refuse_different(metanetwork, "metanetworks")
        return None if after_epoch is None else after_epoch(epoch, optimizer)

    run_epochs(
        config.epochs,
        config.steps_per_epoch,
        batches,
        step,
        optimizer,
        schedule,
        model=metanetwork,
        seed=seed,
        title=TITLE,
        start=start,
        log=log,
        after_epoch=save,
        bookmark=bookmark,
        pieces=pieces,
    )


def _items(
    subjects: Sequence[DataModel],
    split: Split,
    config: MetaTrain,
    plan: Shares,
    augment: Augment | None,
    rng: torch.Generator,
) -> Iterator[Item]:
    """What this process does in the steps of an epoch; mini-batch i has images of data model i mod so many.

    Every lesson has a stream of its own. A process reads its part of each batch where all batches of a step are of one
    stream; otherwise whole batches, those of its own data models.
    """
    usual = Lesson(split, augment, config.pruner_reg)
    lessons = {id(own): own for own in (subject.lesson or usual for subject in subjects)}
    whole = len(lessons) > 1 and plan.models > 1
    streams: dict[int, Iterator[Batch]] = {}
    for key, own in lessons.items():
        size = min(config.batch_size, len(own.split))
        streams[key] = _endless(own.split, size, rng, own.augment, None if whole else plan.parts(size))
    for _ in range(config.steps_per_epoch):
        drawn = [subjects[index] for index in plan.draw(len(subjects), rng)]
        turns = itertools.islice(itertools.cycle(drawn), config.batches)
        big = [next(streams[id(subject.lesson or usual)]) for subject in turns]
        yield [(drawn[number], [own for own in big[number :: len(drawn)] if len(own[1])]) for number in plan.mine]


def _step(metanetwork: MetaNetwork, item: Item, config: MetaTrain, plan: Shares, pieces: Pieces) -> Metrics:
    """Leave the step's gradient in the metanetwork's parameters, the same in all processes."""
    sums: dict[str, float] = defaultdict(float)
    options = config.model_dump(include=set(STEP))
    for subject, own in item:
        options["pruner_reg"] = (subject.lesson or config).pruner_reg
        found = meta_step(metanetwork, subject, own, **options, crew=plan.crew, pieces=pieces)
        for key, value in found.items():
            sums[key] += value
    return averaged_over_processes(sums, metanetwork, len(item))


def _endless(
    split: Split, size: int, rng: torch.Generator, augment: Augment | None, parts: Iterator[slice] | None
) -> Iterator[Batch]:
    while True:
        yield from split.batches(size, generator=rng, augment=augment, drop_last=True, parts=parts)
