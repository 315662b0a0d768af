"""Products of activations, as sums over letters: matmul, bmm, einsum, and through them attention.

An activation carries its channels along some of its letters. What is summed away, and what stays, decides:

    q[h x z] k[h y z] -> [h x y]    channels (h z) of both are summed away together: attention scores
    s[h x y] v[h y z] -> [h x z]    scores carry no channel, the values' channels stay: one attention is complete
    k[h z y] v[h y w] -> [h z w]    nothing is summed away, both stay: scores of a linear or cross-covariance attention
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmn.builder import Attention
from gmn.flow import Flow, Scores, nothing
from gmn.rules import Call, Parameters, register_function

from .linear import project

Operand = tuple[Flow, str]


@register_function("matmul", "__matmul__", "bmm", "mm")
def matmul(call: Call) -> Flow | None:
    """[..., i, j] times [..., j, k]."""
    a, b = call.args[0], call.argument(1, "mat2", call.kwargs.get("other"))
    if isinstance(b, Parameters) and b.origin is not None and len(b.shape) == 2:
        matrix = call.builder.tensor(b.origin)
        stored = b.shape[::-1] if b.flipped else b.shape
        return project(call, matrix, None, transposed=not b.flipped) if tuple(matrix.shape) == stored else None
    a, b = _fixed(a), _fixed(b)
    if a is None or b is None or min(a.ids.dim(), b.ids.dim()) < 2:
        return None
    batch = "abcdefgh"[: len(call.shape) - 2]
    left, right = (batch[len(batch) - flow.ids.dim() + 2 :] for flow in (a, b))
    return multiply(call, (a, left + "xz"), (b, right + "zy"), batch + "xy", call.shape)


@register_function("einsum")
def einsum(call: Call) -> Flow | None:
    """Two operands, written with letters."""
    if len(call.args) != 3 or not isinstance(call.args[0], str):
        return None
    inputs, _, out = call.args[0].replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if "." in inputs or not right or (not out and call.shape):
        return None
    a, b = _fixed(call.args[1]), _fixed(call.args[2])
    return None if a is None or b is None else multiply(call, (a, left), (b, right), out, call.shape)


def _fixed(operand: object) -> Flow | None:
    """An operand as an activation; a computed table, such as relative positions, carries no channel."""
    if isinstance(operand, Flow):
        return operand
    learnt = isinstance(operand, Parameters) and operand.origin is not None  # a weight that this rule cannot place
    return None if learnt or not isinstance(operand, (Parameters, Tensor)) else Flow(nothing(tuple(operand.shape)))


def multiply(call: Call, left: Operand, right: Operand, out: str, shape: tuple[int, ...]) -> Flow:
    """The channels of a product of two activations that is summed over the letters missing in `out`."""
    carried = [_carried(*left), _carried(*right)]
    if not carried[0] or not carried[1]:
        scores, values = (left, right) if not carried[0] else (right, left)
        return _weigh(call, scores[0], values, out, shape)
    heads = "".join(letter for letter in carried[0] if letter in carried[1] and letter in out)
    tails = ["".join(letter for letter in letters if letter not in heads) for letters in carried]
    a, b = (_once(_listed(*side, heads + tail)) for side, tail in zip((left, right), tails, strict=True))
    if len(a) != len(b) or bool((torch.cat([a, b]) < 0).any()):
        for flow in (left[0], right[0]):
            call.builder.freeze(flow.nodes, f"multiplied with other channels in {call.name}")
        return Flow(nothing(shape), uses=call.uses)
    width_one = not tails[0] and _sums_single(left, right, out)  # heads of one channel each
    if not tails[0] and not width_one:  # channel times channel
        call.builder.tie(a, b)
        return Flow(_arrange(left, out, shape), uses=call.uses)
    summed = width_one or tails[0] not in out
    if summed:
        call.builder.tie(a, b)
    width = torch.Size([left[0].ids.shape[left[1].index(letter)] for letter in tails[0]]).numel()
    return Flow(nothing(shape), uses=call.uses, scores=Scores(a, b, len(a) // width, summed))


def _sums_single(left: Operand, right: Operand, out: str) -> bool:
    """Whether a letter of size one is summed away on both sides."""
    gone = [letter for letter in left[1] if letter in right[1] and letter not in out]
    return any(flow.ids.shape[letters.index(letter)] == 1 for letter in gone for flow, letters in (left, right))


def _carried(flow: Flow, letters: str) -> str:
    """The letters along which an activation carries its channels."""
    ids = flow.ids
    if not len(flow.nodes):
        return ""
    varies = [not bool((ids == ids.narrow(d, 0, 1)).all()) for d in range(ids.dim())]
    return "".join(letter for letter, v in zip(letters, varies, strict=True) if v)


def _listed(flow: Flow, letters: str, order: str) -> Tensor:
    """The nodes along some letters, in that order of letters."""
    ids = flow.ids
    for axis, letter in enumerate(letters):
        if letter not in order:
            ids = ids.narrow(axis, 0, 1)
    kept = [letters.index(letter) for letter in order]
    return ids.permute(*kept, *(axis for axis in range(ids.dim()) if axis not in kept)).flatten()


def _once(nodes: Tensor) -> Tensor:
    """The nodes without the repetitions of a batch that shares an axis with the heads."""
    size = len(nodes.unique())
    table = nodes.view(-1, size) if len(nodes) % size == 0 else nodes[None]
    return table[0] if bool((table == table[0]).all()) else nodes


def _arrange(values: Operand, out: str, shape: tuple[int, ...]) -> Tensor:
    """The shadow of a result that keeps the channels of one operand."""
    flow, letters = values
    nodes = _listed(flow, letters, "".join(letter for letter in out if letter in letters))
    sizes = [flow.ids.shape[letters.index(letter)] if letter in letters else 1 for letter in out]
    return nodes.view(sizes).expand(shape)


def _weigh(call: Call, scores: Flow, values: Operand, out: str, shape: tuple[int, ...]) -> Flow:
    """Scores, or any weights without channels, times values: the values' channels stay."""
    flow, letters = values
    carried = _carried(flow, letters)
    gone = [letter for letter in carried if letter not in out]
    if scores.scores is not None and carried:
        tail = gone[0] if gone else carried[-1]
        _attention(call, scores.scores, _once(_listed(flow, letters, carried.replace(tail, "") + tail)))
    if not gone:
        return Flow(_arrange(values, out, shape), uses=call.uses, scores=None if carried else flow.scores)
    size = flow.ids.shape[letters.index(gone[0])]
    fresh = [letter for axis, letter in enumerate(out) if letter not in letters and shape[axis] == size]
    if scores.scores is None or len(gone) > 1 or not fresh:
        note = call.builder.regroup if len(carried) > len(gone) else call.builder.freeze  # whole heads may go
        note(flow.nodes, f"mixed with other channels in {call.name}")
        return Flow(nothing(shape), uses=call.uses)
    return Flow(_arrange((flow, letters.replace(gone[0], fresh[-1])), out, shape), uses=call.uses)


def _attention(call: Call, scores: Scores, values: Tensor) -> None:
    """Note a complete attention; where nothing was summed away the three are told apart by their order."""
    parts = [scores.query, scores.key, values]
    if not scores.summed:
        parts.sort(key=lambda nodes: int(nodes[0]))
    call.builder.attention.append(Attention(call.name, parts[0], parts[1], parts[2], scores.heads))
