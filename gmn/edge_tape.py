"""The edges of a graph through a metanetwork, in one buffer: forward in place, backward by rebuilding.

The state of an edge after l layers is e_0 times a product of l factors of node vectors, so no layer's states need to
be stored. The forward pass keeps the node vectors of every layer and one buffer of all edge states, which the backward
pass fills with their gradients; what it needs of the states it rebuilds chunk by chunk, from the features or from the
states of an earlier layer, where there was room to keep some.

Three functions of autograd share a tape: encode, one per layer, decode. Each hands a token to the next, so that
autograd runs their backward passes in the opposite order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gmn.blockwise import PLAIN, Kernels, Upstream, exact, ties
from gmn.edge_chunks import columns_of
from gmn.edge_columns import Gradients, columns, parameters_of
from gmn.edge_sections import Collected, Nodes, Section, sections
from gmn.errors import ConversionError
from gmn.graph import EdgeBlock

CHUNK_MB = {"cpu": 1.0}  # fits into a core's cache; elsewhere many edges at a time
LARGE_CHUNK_MB = 64.0
KEEP_MB = 128.0


USED_UP = "the graph of the metanetwork was used up by an earlier backward pass"


class Layer(NamedTuple):
    """What the backward pass needs of a layer.

    Attributes:
        extremes: [H, N]: high and low of the messages along the edges, and of those against them.
        crossed: Numbers of the chunks in which a node finds an extreme that it finds elsewhere too.
    """

    nodes: Nodes
    extremes: tuple[Tensor, ...]
    crossed: set[int]


class EdgeTape:
    """The edges of one graph on their way through one metanetwork.

    Args:
        blocks: Edge blocks.
        features: [G, O, I, K] of each block.
        encoders: Of each block.
        decoders: Of each block; None where its features stay.
        nodes: N.
        hidden: H.
        depth: L, number of layers.
        max_chunk_mb: Largest chunk; None chooses by device. The result does not depend on it but for rounding.
        keep_mb: Room for the states before some layers, from which those of later ones are rebuilt sooner.
        stored: Type that states and their gradients are held in; what is done to a chunk, sums above all, has the
            features' type. None: that too.
        kernels: What is done to a chunk.

    Raises:
        ConversionError: if gradients of the features are asked for, which this backend does not compute.
    """

    def __init__(
        self,
        blocks: Sequence[EdgeBlock],
        features: Sequence[Tensor],
        encoders: Sequence[nn.Module],
        decoders: Sequence[nn.Module | None],
        *,
        nodes: int,
        hidden: int,
        depth: int,
        max_chunk_mb: float | None = None,
        keep_mb: float = KEEP_MB,
        stored: torch.dtype | None = None,
        kernels: Kernels = PLAIN,
    ) -> None:
        if torch.is_grad_enabled() and any(f.requires_grad for f in features):
            raise ConversionError("edge features cannot have gradients in the blocks backend", hint="use backend: pyg")
        self.features, self.hidden = features, hidden
        self.encoders, self.decoders, self.kernels = encoders, decoders, kernels
        sample = features[0]
        self.dtype, self.stored = sample.dtype, stored or sample.dtype
        megabytes = max_chunk_mb or CHUNK_MB.get(sample.device.type, LARGE_CHUNK_MB)
        known: dict[Any, int] = {}  # blocks of one encoder and decoder have one number
        alike = tuple(known.setdefault((e, d), len(known)) for e, d in zip(encoders, decoders, strict=True))
        elements = megabytes * 2**20 / sample.element_size()
        self.sections = sections(tuple(blocks), alike, hidden, nodes, elements, sample.device)
        self.chunks = [chunk for section in self.sections for chunk in section.chunks]
        self.in_degree, self.out_degree = (sample.new_zeros(nodes) for _ in range(2))
        for block in blocks:
            _, out, into, _ = block.shape
            self.in_degree[block.dst[0] : sum(block.dst)] += into
            self.out_degree[block.src[0] : sum(block.src)] += out
        self.layers: list[Layer] = []
        self.states: list[Tensor] = []
        self.keeps = torch.is_grad_enabled()
        size = hidden * sum(math.prod(chunk.shape) for chunk in self.chunks) * self.stored.itemsize
        count = min(depth - 1, int(keep_mb * 2**20 // size)) if self.keeps else 0
        self.kept: dict[int, list[Tensor]] = {(n + 1) * depth // (count + 1): [] for n in range(count)}
        self.graded = False

    # -- what the metanetwork calls ----------------------------------------------------------------------------------

    def encode(self) -> Tensor:
        """Fill the buffer; returns the first token."""
        return _Encode.apply(self, *parameters_of(self.encoders))  # type: ignore[no-any-return]

    def layer(self, token: Tensor, sent: Tensor, against: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """The next token, and total, squares, high, low [H, N] of the messages along and against the edges.

        Args:
            sent, against, left, right: [H, N], contiguous: what nodes send along and against edges; C and D.
        """
        return _Layer.apply(self, token, sent, against, left, right)  # type: ignore[no-any-return]

    def decode(self, token: Tensor, ratio: float) -> list[Tensor]:
        """[G, O, I, K] of each block that has a decoder: ratio times what it says of the final states."""
        return list(_Decode.apply(self, ratio, token, *parameters_of(self.decoders)))

    # -- chunks ------------------------------------------------------------------------------------------------------

    def rebuilt(self, numbers: Sequence[int], section: Section, layers: int) -> Iterator[Tensor]:
        """[b, O, I] of some of a section's chunks: the states after so many layers; bit for bit what they were."""
        start = max((layer for layer, kept in self.kept.items() if kept and layer <= layers), default=0)
        steps = [section.pairs(nodes) for nodes, *_ in self.layers[start:layers]]
        for number in numbers:
            e = self.kept[start][number].to(self.dtype, copy=start < layers) if start else self.encoded(number)
            for dst, src in steps:
                self.kernels.advance(e, dst[number - section.first], src[number - section.first])
                self.round(e)
            yield e

    def encoded(self, number: int) -> Tensor:
        """[b, O, I]: the states of the chunk of that number before all layers."""
        chunk = self.chunks[number]
        g, rows, into = chunk.shape
        with torch.no_grad():
            e = columns(self.encoders[chunk.block], columns_of(self.features, chunk)).view(self.hidden * g, rows, into)
        self.round(e)
        return e

    def shared_by_ties(self, number: int, along: Upstream, against: Upstream) -> tuple[Upstream, Upstream]:
        """Gradients of the extremes [H, N], divided by the number of messages that are.

        These are counted in the chunks that share an extreme with others; where they do not, nobody may ask.
        """
        layer, counts = self.layers[number], [torch.zeros_like(along.high) for _ in range(4)]
        for section in self.sections:
            crossed = sorted(layer.crossed.intersection(section.numbers))
            if not crossed:
                continue
            ends, upstream = section.ends(layer.nodes), section.upstream(along, against)
            for chunk, e in zip(crossed, self.rebuilt(crossed, section, number), strict=True):
                at = chunk - section.first
                dst, src = upstream[at]
                for count, side, sent, extreme, axis in (
                    (counts[0], section.targets, ends[at].sent, dst.highest, 2),
                    (counts[1], section.targets, ends[at].sent, dst.lowest, 2),
                    (counts[2], section.sources, ends[at].against, src.highest, 1),
                    (counts[3], section.sources, ends[at].against, src.lowest, 1),
                ):
                    side.add_of(at, count, ties(e, sent, extreme, axis))
        high, low, back_high, back_low = (count.clamp_(min=1) for count in counts)
        return (
            along._replace(high=along.high / high, low=along.low / low),
            against._replace(high=against.high / back_high, low=against.low / back_low),
        )

    def round(self, e: Tensor) -> None:
        """What storing does to states, in place."""
        if self.stored != self.dtype:
            e.copy_(e.to(self.stored))

    @contextmanager
    def opened(self, state: Tensor) -> Iterator[Tensor]:
        """Stored numbers in the type to compute with; what is made of them is stored again."""
        work = state.to(self.dtype)
        yield work
        if work is not state:
            state.copy_(work)

    def take_gradients(self) -> list[Tensor]:
        """The buffer, which holds gradients from now on; zeros if nothing was decoded."""
        if not self.graded:
            self.graded = True
            for state in self.states:
                state.zero_()
        return self.states


# -- autograd ----------------------------------------------------------------------------------------------------------


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, tape: EdgeTape, *parameters: Tensor) -> Tensor:
        ctx.tape = tape
        ctx.save_for_backward(*parameters)
        tape.states = [tape.encoded(number).to(tape.stored) for number in range(len(tape.chunks))]
        return tape.features[0].new_zeros(())

    @staticmethod
    @exact
    def backward(ctx: Any, *_: Tensor) -> Any:
        tape: EdgeTape = ctx.tape
        total = Gradients(tape.encoders, ctx.saved_tensors)
        for chunk, grad in zip(tape.chunks, tape.take_gradients(), strict=True):
            with torch.enable_grad():
                encoded = columns(tape.encoders[chunk.block], columns_of(tape.features, chunk))
            total.add(tape.encoders[chunk.block], encoded, grad.view_as(encoded).to(tape.dtype))
        tape.states = []
        return None, *total.of_all


class _Layer(Function):
    @staticmethod
    def forward(
        ctx: Any, tape: EdgeTape, token: Tensor, sent: Tensor, against: Tensor, left: Tensor, right: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.tape, ctx.number = tape, len(tape.layers)
        sent, against, left, right = (v.detach() for v in (sent, against, left, right))
        nodes = Nodes(sent, against, torch.stack((left, right), 1))
        along, back = (Collected(sent, degree, keeps=tape.keeps) for degree in (tape.in_degree, tape.out_degree))
        if ctx.number in tape.kept:
            tape.kept[ctx.number] = [e.clone() for e in tape.states]
        for section in tape.sections:
            each = []
            for number, ends in zip(section.numbers, section.ends(nodes), strict=True):
                with tape.opened(tape.states[number]) as e:
                    each.append(tape.kernels.both(e, ends))
                    tape.kernels.advance(e, ends.dst, ends.src)
            along.add(section.first, section.targets, [own for own, _ in each])
            back.add(section.first, section.sources, [own for _, own in each])
        moments = along.finished(), back.finished()
        if tape.keeps:  # detached: what autograd hands out must not be held by what it was made by
            extremes = tuple(x.detach() for own in moments for x in own[2:])
            tape.layers.append(Layer(nodes, extremes, along.crossed() | back.crossed()))
        return token.clone(), *moments[0], *moments[1]

    @staticmethod
    @exact
    def backward(ctx: Any, *grads: Tensor) -> Any:
        token, *grads_of_moments = grads
        tape: EdgeTape = ctx.tape
        if ctx.number >= len(tape.layers):
            raise ConversionError(USED_UP)
        nodes, extremes, crossed = tape.layers[ctx.number]
        along, against = _upstream(grads_of_moments[:4], extremes[:2]), _upstream(grads_of_moments[4:], extremes[2:])
        divided = tape.shared_by_ties(ctx.number, along, against) if crossed else None
        total, buffers = Nodes(*(torch.zeros_like(v) for v in nodes)), tape.take_gradients()
        for section in tape.sections:
            upstream, found = section.upstream(along, against), []
            shared = section.upstream(*divided) if divided and not crossed.isdisjoint(section.numbers) else upstream
            states = tape.rebuilt(section.numbers, section, ctx.number)
            for at, (number, ends, e) in enumerate(zip(section.numbers, section.ends(nodes), states, strict=True)):
                with tape.opened(buffers[number]) as grad:
                    own = (shared if number in crossed else upstream)[at]
                    found.append(tape.kernels.backward(e, grad, ends, *own, shared=number in crossed))
            section.add_ends(total, found)
        del tape.layers[ctx.number :]
        tape.kept.pop(ctx.number, None)
        return None, token, total.sent, total.against, *total.pairs.unbind(1)


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, tape: EdgeTape, ratio: float, token: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.tape, ctx.ratio = tape, ratio
        ctx.save_for_backward(*parameters)
        made = {i: torch.empty_like(tape.features[i]) for i, d in enumerate(tape.decoders) if d is not None}
        for chunk, e in zip(tape.chunks, tape.states, strict=True):
            decoder = tape.decoders[chunk.block]
            if decoder is not None:
                said = columns(decoder, e.view(tape.hidden, -1).to(tape.dtype)).mul_(ratio).T
                for part, own in zip(chunk.parts, said.tensor_split(len(chunk.parts)), strict=True):
                    place = made[part.block][part.pieces, part.rows]
                    place.copy_(own.reshape(place.shape))
        if not tape.keeps:
            tape.states = []
        return tuple(made.values())

    @staticmethod
    @exact
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tape: EdgeTape = ctx.tape
        if not tape.states or tape.graded:
            raise ConversionError(USED_UP)
        total, tape.graded = Gradients(tape.decoders, ctx.saved_tensors), True
        order = [index for index, decoder in enumerate(tape.decoders) if decoder is not None]
        given = dict(zip(order, grads, strict=True))
        for chunk, buffer in zip(tape.chunks, tape.states, strict=True):
            decoder = tape.decoders[chunk.block]
            if decoder is None:
                buffer.zero_()
                continue
            grad = columns_of(given, chunk)
            e = buffer.to(tape.dtype, copy=True).view(tape.hidden, -1).requires_grad_()  # still the final states
            with torch.enable_grad():
                said = columns(decoder, e)
            back = total.add(decoder, said, grad * ctx.ratio, e)
            assert back is not None
            buffer.copy_(back.view_as(buffer))
        return None, None, grads[0].new_zeros(()), *total.of_all


def _upstream(grads: Sequence[Tensor], extremes: Sequence[Tensor]) -> Upstream:
    total, squares, high, low = grads
    return Upstream(total, 2 * squares, high, low, *extremes)
