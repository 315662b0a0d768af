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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gmn.blockwise import PLAIN, Ends, Kernels, Moments, Upstream, exact, ties
from gmn.edge_chunks import Chunk, added, columns_of, grouped, placed, taken
from gmn.edge_columns import Gradients, columns, parameters_of
from gmn.errors import ConversionError
from gmn.graph import EdgeBlock

CHUNK_MB = {"cpu": 1.0}  # fits into a core's cache; elsewhere many edges at a time
LARGE_CHUNK_MB = 64.0
KEEP_MB = 128.0


USED_UP = "the graph of the metanetwork was used up by an earlier backward pass"


class Extremes(NamedTuple):
    """Of all messages that nodes get [H, N], and how many chunks have one that is."""

    high: Tensor
    low: Tensor
    high_chunks: Tensor
    low_chunks: Tensor


@dataclass(frozen=True)
class Layer:
    """What the backward pass needs of a layer: node vectors [H, N], and the extremes."""

    sent: Tensor
    against: Tensor
    dst: Tensor  # [H, N, 2]: c, d
    src: Tensor  # [H, 2, N]: d, c
    along: Extremes
    back: Extremes


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
        self.blocks, self.features, self.nodes, self.hidden = blocks, features, nodes, hidden
        self.encoders, self.decoders, self.kernels = encoders, decoders, kernels
        sample = features[0]
        self.dtype, self.stored = sample.dtype, stored or sample.dtype
        megabytes = max_chunk_mb or CHUNK_MB.get(sample.device.type, LARGE_CHUNK_MB)
        known: dict[Any, int] = {}  # blocks of one encoder and decoder have one number
        alike = tuple(known.setdefault((e, d), len(known)) for e, d in zip(encoders, decoders, strict=True))
        self.chunks = grouped(tuple(blocks), alike, hidden, megabytes * 2**20 / sample.element_size(), sample.device)
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

    def own(self, vector: Tensor, nodes: slice | Tensor, chunk: Chunk) -> Tensor:
        """[b, n] of a chunk from [H, N]."""
        return taken(vector, 1, nodes).reshape(self.hidden * chunk.shape[0], -1)

    def ends(self, layer: Layer, chunk: Chunk) -> Ends:
        g = chunk.shape[0]
        dst = taken(layer.dst, 1, chunk.dst).reshape(self.hidden * g, -1, 2)
        src = taken(layer.src, 2, chunk.src)
        if g > 1:
            src = src.reshape(self.hidden, 2, g, -1).transpose(1, 2).reshape(self.hidden * g, 2, -1)
        return Ends(self.own(layer.sent, chunk.src, chunk), self.own(layer.against, chunk.dst, chunk), dst, src)

    def rebuilt(self, number: int, layers: int) -> Tensor:
        """[b, o, I]: the states of the chunk of that number after so many layers; bit for bit what they were."""
        chunk = self.chunks[number]
        g, rows, into = chunk.shape
        start = max((layer for layer, kept in self.kept.items() if kept and layer <= layers), default=0)
        with torch.no_grad():
            if start:
                e = self.kept[start][number].to(self.dtype, copy=start < layers)
            else:
                e = columns(self.encoders[chunk.block], columns_of(self.features, chunk)).view(
                    self.hidden * g, rows, into
                )
                self.round(e)
            for layer in self.layers[start:layers]:
                self.kernels.advance(e, self.ends(layer, chunk))
                self.round(e)
        return e

    def ties_cross_chunks(self, number: int) -> bool:
        """Whether a node's extreme of that layer is found in several chunks, as equal weights may have it."""
        layer = self.layers[number]
        counts = [count for found in (layer.along, layer.back) for count in (found.high_chunks, found.low_chunks)]
        return bool((torch.stack(counts) > 1).any())

    def shared_by_ties(self, number: int, along: Upstream, against: Upstream) -> tuple[Upstream, Upstream]:
        """Gradients of the extremes [H, N], divided by the number of messages that are; these are counted here."""
        layer, of_all = self.layers[number], [torch.zeros_like(along.high) for _ in range(4)]
        for index, chunk in enumerate(self.chunks):
            e, ends = self.rebuilt(index, number), self.ends(layer, chunk)
            for count, sent, extreme, nodes, axis in (
                (of_all[0], ends.sent, along.highest, chunk.dst, 2),
                (of_all[1], ends.sent, along.lowest, chunk.dst, 2),
                (of_all[2], ends.against, against.highest, chunk.src, 1),
                (of_all[3], ends.against, against.lowest, chunk.src, 1),
            ):
                own = ties(e, sent, self.own(extreme, nodes, chunk), axis)
                added(count, nodes, own.reshape(self.hidden, -1))
        high, low, back_high, back_low = (count.clamp(min=1) for count in of_all)
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
        tape.states = [tape.rebuilt(number, 0).to(tape.stored) for number in range(len(tape.chunks))]
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
        found = [Moments(*(torch.full_like(sent, value) for value in (0, 0, -torch.inf, torch.inf))) for _ in range(2)]
        pairs = torch.stack((left, right), 2), torch.stack((right, left), 1)
        # detached: what autograd hands out must not be held by what it was made by
        kept = [
            Extremes(own.high.detach(), own.low.detach(), torch.zeros_like(sent), torch.zeros_like(sent))
            for own in found
        ]
        layer = Layer(sent, against, *pairs, *kept)
        if ctx.number in tape.kept:
            tape.kept[ctx.number] = [e.clone() for e in tape.states]
        for chunk, state in zip(tape.chunks, tape.states, strict=True):
            ends = tape.ends(layer, chunk)
            with tape.opened(state) as e:
                each = tape.kernels.both(e, ends)
                tape.kernels.advance(e, ends)
            for total, own, nodes, at in zip(found, each, (chunk.dst, chunk.src), kept, strict=True):
                _join(total, own, nodes, at if tape.keeps else None)
        for own in found:  # nodes without a message
            own.high.masked_fill_(own.high == -torch.inf, 0.0)
            own.low.masked_fill_(own.low == torch.inf, 0.0)
        if tape.keeps:
            tape.layers.append(layer)
        return token.clone(), *(x for own in found for x in own)

    @staticmethod
    @exact
    def backward(ctx: Any, *grads: Tensor) -> Any:
        token, *grads_of_moments = grads
        tape: EdgeTape = ctx.tape
        if ctx.number >= len(tape.layers):
            raise ConversionError(USED_UP)
        layer, shared = tape.layers[ctx.number], tape.ties_cross_chunks(ctx.number)
        along, against = _upstream(grads_of_moments[:4], layer.along), _upstream(grads_of_moments[4:], layer.back)
        if shared:
            along, against = tape.shared_by_ties(ctx.number, along, against)
        sent, back, left, right = (torch.zeros_like(layer.sent) for _ in range(4))
        for number, (chunk, buffer) in enumerate(zip(tape.chunks, tape.take_gradients(), strict=True)):
            g, e, ends = chunk.shape[0], tape.rebuilt(number, ctx.number), tape.ends(layer, chunk)
            at_dst = Upstream(*(tape.own(v, chunk.dst, chunk) for v in along))
            at_src = Upstream(*(tape.own(v, chunk.src, chunk) for v in against))
            with tape.opened(buffer) as grad:
                own = tape.kernels.backward(e, grad, ends, at_dst, at_src, shared=shared)
            targets, sources = (
                v.reshape(tape.hidden, g, 2, -1).transpose(1, 2).reshape(tape.hidden, 2, -1) for v in own[2:]
            )
            for total, at, value in (
                (sent, chunk.src, own.sent.reshape(tape.hidden, -1)),
                (back, chunk.dst, own.against.reshape(tape.hidden, -1)),
                (left, chunk.dst, targets[:, 0]),
                (right, chunk.dst, targets[:, 1]),
                (left, chunk.src, sources[:, 1]),
                (right, chunk.src, sources[:, 0]),
            ):
                added(total, at, value)
        del tape.layers[ctx.number :]
        tape.kept.pop(ctx.number, None)
        return None, token, sent, back, left, right


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


def _join(found: Moments, own: Moments, nodes: slice | Tensor, at: Extremes | None) -> None:
    """Add a chunk's moments to those of all nodes; `at` counts the chunks that have an extreme."""
    total, squares, high, low = (value.reshape(len(found.total), -1) for value in own)
    added(found.total, nodes, total)
    added(found.squares, nodes, squares)
    for extreme, value, better, count in (
        (found.high, high, torch.maximum, at and at.high_chunks),
        (found.low, low, torch.minimum, at and at.low_chunks),
    ):
        old = taken(extreme, 1, nodes)
        best = better(old, value)
        if count is not None:
            placed(count, nodes, taken(count, 1, nodes) * (old == best) + (value == best))
        placed(extreme, nodes, best)


def _upstream(grads: Sequence[Tensor], found: Extremes) -> Upstream:
    total, squares, high, low = grads
    return Upstream(total, squares, high, low, found.high, found.low)
