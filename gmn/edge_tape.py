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
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from gmn.blockwise import PLAIN, Ends, Extremes, Kernels, Moments, Upstream, joined
from gmn.edge_chunks import Chunk, added, columns_of, grouped, placed, taken
from gmn.errors import ConversionError
from gmn.graph import EdgeBlock

CHUNK_MB = {"cpu": 1.0}  # fits into a core's cache; elsewhere many edges at a time
LARGE_CHUNK_MB = 64.0
KEEP_MB = 128.0


@dataclass(frozen=True)
class Layer:
    """What the backward pass needs of a layer: node vectors [H, N], and the extremes with their ties."""

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
        self.kept: dict[int, list[Tensor]] = {(n + 1) * (depth + 1) // (count + 1): [] for n in range(count)}
        self.graded = False

    # -- what the metanetwork calls ----------------------------------------------------------------------------------

    def encode(self) -> Tensor:
        """Fill the buffer; returns the first token."""
        return _Encode.apply(self, *_parameters(self.encoders))  # type: ignore[no-any-return]

    def layer(self, token: Tensor, sent: Tensor, against: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """The next token, and total, squares, high, low [H, N] of the messages along and against the edges.

        Args:
            sent, against, left, right: [H, N], contiguous: what nodes send along and against edges; C and D.
        """
        return _Layer.apply(self, token, sent, against, left, right)  # type: ignore[no-any-return]

    def decode(self, token: Tensor, ratio: float) -> list[Tensor]:
        """[G, O, I, K] of each block that has a decoder: ratio times what it says of the final states."""
        return list(_Decode.apply(self, ratio, token, *_parameters(self.decoders)))

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
    def backward(ctx: Any, *_: Tensor) -> Any:
        tape: EdgeTape = ctx.tape
        total = _Gradients(tape.encoders, ctx.saved_tensors)
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
        none = sent.new_zeros(tape.hidden, tape.nodes)
        high, low = torch.full_like(none, -torch.inf), torch.full_like(none, torch.inf)
        found = [Moments(*(x.clone() for x in (none, none, high, low, none, none))) for _ in range(2)]
        pairs = torch.stack((left, right), 2), torch.stack((right, left), 1)
        # detached: what autograd hands out must not be held by what it was made by
        kept = (Extremes(*(x.detach() for x in own[2:])) for own in found)
        layer = Layer(sent, against, *pairs, *kept)
        if ctx.number in tape.kept:
            tape.kept[ctx.number] = [e.clone() for e in tape.states]
        for chunk, state in zip(tape.chunks, tape.states, strict=True):
            ends = tape.ends(layer, chunk)
            with tape.opened(state) as e:
                along, against_edges = tape.kernels.both(e, ends, ties=tape.keeps)
                tape.kernels.advance(e, ends)
            _join(found[0], chunk.dst, along)
            _join(found[1], chunk.src, against_edges)
        for own in found:  # nodes without a message
            own.high.masked_fill_(own.high == -torch.inf, 0.0)
            own.low.masked_fill_(own.low == torch.inf, 0.0)
        if tape.keeps:
            tape.layers.append(layer)
        return token.clone(), *(x for own in found for x in own[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        token, *grads_of_moments = grads
        tape: EdgeTape = ctx.tape
        layer = tape.layers[ctx.number]
        along, against = _upstream(grads_of_moments[:4], layer.along), _upstream(grads_of_moments[4:], layer.back)
        sent, back, left, right = (torch.zeros_like(layer.sent) for _ in range(4))
        for number, (chunk, buffer) in enumerate(zip(tape.chunks, tape.take_gradients(), strict=True)):
            g, e, ends = chunk.shape[0], tape.rebuilt(number, ctx.number), tape.ends(layer, chunk)
            at_dst = Upstream(*(tape.own(v, chunk.dst, chunk) for v in along))
            at_src = Upstream(*(tape.own(v, chunk.src, chunk) for v in against))
            with tape.opened(buffer) as grad:
                own = tape.kernels.backward(e, grad, ends, at_dst, at_src)
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
        ctx.tape, ctx.ratio, ctx.depth = tape, ratio, len(tape.layers)
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
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tape: EdgeTape = ctx.tape
        if not tape.states:
            raise ConversionError("the graph of the metanetwork was used up by an earlier backward pass")
        total, tape.graded = _Gradients(tape.decoders, ctx.saved_tensors), True
        order = [index for index, decoder in enumerate(tape.decoders) if decoder is not None]
        given = dict(zip(order, grads, strict=True))
        for number, (chunk, buffer) in enumerate(zip(tape.chunks, tape.states, strict=True)):
            decoder = tape.decoders[chunk.block]
            if decoder is None:
                buffer.zero_()
                continue
            grad = columns_of(given, chunk)
            e = tape.rebuilt(number, ctx.depth).view(tape.hidden, -1).requires_grad_()
            with torch.enable_grad():
                said = columns(decoder, e)
            back = total.add(decoder, said, grad * ctx.ratio, e)
            assert back is not None
            buffer.copy_(back.view_as(buffer))
        return None, None, grads[0].new_zeros(()), *total.of_all


class _Gradients:
    """Sums of the gradients of some modules' parameters, in the order of `_parameters`.

    What the forward pass read is given too: the backward pass computes again, and must find the same.
    """

    def __init__(self, modules: Sequence[nn.Module | None], read: Sequence[Tensor]) -> None:
        parameters = _parameters(modules)
        if any(now is not then for now, then in zip(parameters, read, strict=True)):
            hint = "call backward inside of what exchanges them, or use backend: pyg"
            raise ConversionError("the metanetwork has other parameters than in the forward pass", hint=hint)
        self.places = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.of_all: list[Tensor | None] = [None] * len(self.places)

    def add(self, module: nn.Module, output: Tensor, grad: Tensor, wanted: Tensor | None = None) -> Tensor | None:
        """Add what an output's gradient means for a module's parameters; returns that for `wanted`."""
        own = [p for p in module.parameters() if p.requires_grad]
        inputs = own if wanted is None else [*own, wanted]
        found: Sequence[Tensor] = torch.autograd.grad(output, inputs, grad) if inputs else ()
        for parameter, value in zip(own, found, strict=False):
            index = self.places[id(parameter)]
            old = self.of_all[index]
            self.of_all[index] = value if old is None else old.add_(value)
        return None if wanted is None else found[len(own)]


def _parameters(modules: Sequence[nn.Module | None]) -> list[Tensor]:
    """Each parameter once: blocks of one kind share their encoder."""
    return list({id(p): p for module in modules if module is not None for p in module.parameters()}.values())


def _join(found: Moments, nodes: slice | Tensor, own: Moments) -> None:
    hidden = len(found.total)
    old = Moments(*(taken(value, 1, nodes) for value in found))
    new = joined(old, Moments(*(value.reshape(hidden, -1) for value in own)))
    for total, value in zip(found, new, strict=True):
        placed(total, nodes, value)


def _upstream(grads: Sequence[Tensor], found: Extremes) -> Upstream:
    """Gradients of the moments [H, N], those of the extremes shared by their ties."""
    total, squares, high, low = grads
    shared = high / found.high_ties.clamp(min=1), low / found.low_ties.clamp(min=1)
    return Upstream(total, squares, *shared, found.high, found.low)


def columns(module: nn.Module, x: Tensor) -> Tensor:
    """An encoder or decoder on columns: [features, edges] to [features, edges]."""
    if isinstance(module, nn.Sequential):
        for part in module:
            x = columns(part, x)
        return x
    if isinstance(module, nn.Linear):
        return torch.addmm(module.bias[:, None], module.weight, x)
    if isinstance(module, nn.LayerNorm):
        centred = x - x.mean(0, keepdim=True)  # var_mean over the first axis takes nine times as long
        return centred * torch.rsqrt((centred * centred).mean(0, keepdim=True) + module.eps)
    return F.silu(x)
