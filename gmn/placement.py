"""Where the layers of a drawing go: rows by depth, columns of rows, boxes side by side, tracks for long links.

Lengths are inches; x points right, rows count downwards. A link to the next row is drawn straight. A longer one, or a
second one between the same boxes, gets a track: a vertical line that no box and no other track is in the way of.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, median

BOX_HEIGHT = 0.3
PITCH = 0.62  # from row to row
GHOST_PITCH = 0.4
SWAY = 0.05, 0.4  # a row is this much lower for each line that does not come straight down, and at most this
ROOM = 0.5  # between boxes side by side
FIRST_TRACK = 0.32  # from a box to its first track
TRACK = 0.12  # from track to track
LABELLED = 0.26  # from track to track if one of them has a label
LEFT = 20.0  # a layer in the middle has its tracks on the right, up to this much further away
RATIO = 0.8  # height by width of a page that is good to look at
GHOST_ROWS = 2.0  # how many rows of unevenness a box that is drawn again is worth


@dataclass(frozen=True)
class Link:
    """A line between two layers; blocks that would look the same are one link."""

    source: int
    target: int
    style: str
    label: str


@dataclass(frozen=True)
class Box:
    """A layer at the place `x` (its middle) of a row; a `ghost` stands for a layer of another column."""

    layer: int
    row: int
    x: float = 0.0
    ghost: bool = False


@dataclass(frozen=True)
class Route:
    """A link between two boxes of a column, along `track` unless it goes straight to the next row."""

    source: Box
    target: Box
    style: str
    label: str
    track: float | None = None

    @property
    def bundle(self) -> tuple[int, str, str, bool]:
        """Routes from one source that look alike and run the same way share a track."""
        return self.source.layer, self.style, self.label, self.source.row < self.target.row


@dataclass(frozen=True)
class Column:
    """A part of the page: boxes in rows, the links between them, and y (upwards, 0 at first) of the rows."""

    boxes: tuple[Box, ...]
    routes: tuple[Route, ...]
    heights: tuple[float, ...]


def place(layers: Iterable[int], links: Iterable[Link], width: float) -> list[Column]:
    """Columns of boxes of this width, to be drawn from left to right."""
    links = sorted(set(links), key=lambda link: (link.source, link.target, link.style, link.label))
    rows = depths(sorted(layers), links)
    columns = []
    for first, stop in itertools.pairwise(_cuts(rows, links, width)):
        arriving = [link for link in links if first <= rows[link.target] < stop]
        columns.append(_column(rows, arriving, (first, stop), width))
    return columns


def depths(layers: list[int], links: list[Link]) -> dict[int, int]:
    """Length of the longest path to each layer.

    A second input stands right above its first reader, a part without links to the rest after the layer before it. A
    link against the order of the layers (a recurrence) does not count.

    >>> depths([0, 1, 2, 3, 4], [Link(0, 1, "", ""), Link(1, 3, "", ""), Link(2, 3, "", "")])
    {0: 0, 1: 1, 2: 1, 3: 2, 4: 3}
    """
    import networkx as nx

    flow = nx.DiGraph([(link.source, link.target) for link in links if link.source != link.target])
    if not nx.is_directed_acyclic_graph(flow):
        flow.remove_edges_from([edge for edge in flow.edges if edge[0] > edge[1]])
    flow.add_nodes_from(layers)
    rows: dict[int, int] = {}
    for layer in nx.topological_sort(flow):
        rows[layer] = max((1 + rows[before] for before in flow.predecessors(layer)), default=0)
    for layer in layers:
        if not flow.in_degree(layer) and flow.out_degree(layer):
            rows[layer] = min(rows[after] for after in flow.successors(layer)) - 1
    _, *others = sorted(nx.weakly_connected_components(flow), key=lambda part: (-len(part), min(part)))
    for part in sorted(others, key=min):
        lower = 1 + rows.get(min(part) - 1, -1)
        rows |= {layer: rows[layer] + lower for layer in part}
    return {layer: rows[layer] for layer in layers}


# -- columns -----------------------------------------------------------------------------------------------------------


def _cuts(rows: dict[int, int], links: list[Link], width: float) -> list[int]:
    """First row of each column, and the number of rows: columns of like height, cut where few links cross."""
    total = 1 + max(rows.values())
    crossing = [len({k.source for k in links if rows[k.source] < row <= rows[k.target]}) for row in range(total)]
    widest = max(map(len, _by_row(rows)))
    across = widest * (width + ROOM) + max(crossing) * TRACK + 2 * FIRST_TRACK

    def misshapen(count: int) -> float:
        return abs(math.log(math.ceil(total / count) * PITCH / (count * across) / RATIO))

    count = min(range(1, total + 1), key=misshapen)

    @cache
    def best(start: int, columns: int) -> tuple[float, list[int]]:
        ghosts = crossing[start] if start else 0
        mean = (total - start) / columns  # far from the mean nothing is gained
        low, high = start + max(1, int(mean / 2)), min(total - columns + 1, start + math.ceil(1.6 * mean))
        stops = [total] if columns == 1 else range(low, high + 1)
        options = []
        for stop in stops:
            after, cuts = (0.0, [total]) if columns == 1 else best(stop, columns - 1)
            cost = (stop - start + math.ceil(ghosts / widest)) ** 2 + (GHOST_ROWS * ghosts) ** 2
            options.append((cost + after, [start, *cuts]))
        return min(options)

    return best(0, count)[1]


def _column(rows: dict[int, int], links: list[Link], span: tuple[int, int], width: float) -> Column:
    """The rows of a span and the links that arrive there; guests are drawn again above."""
    own = {layer: row for layer, row in rows.items() if span[0] <= row < span[1]}
    guests = sorted({link.source for link in links} - own.keys(), key=lambda layer: (rows[layer], layer))
    wide = max(map(len, _by_row(own)))
    above = math.ceil(len(guests) / wide)
    boxes = {layer: Box(layer, i // wide, ghost=True) for i, layer in enumerate(guests)}
    boxes |= {layer: Box(layer, row - span[0] + above) for layer, row in own.items()}
    boxes = _side_by_side(boxes, links, width + ROOM)
    routes = [Route(boxes[link.source], boxes[link.target], link.style, link.label) for link in links]
    routes = _tracks(routes, list(boxes.values()), width)
    return Column(tuple(boxes.values()), tuple(routes), _heights(list(boxes.values()), routes))


def _by_row(rows: dict[int, int]) -> list[list[int]]:
    """The layers of each row that has any, in the order of the rows."""
    ordered = sorted(rows, key=rows.__getitem__)
    return [list(same) for _, same in itertools.groupby(ordered, key=rows.__getitem__)]


def _heights(boxes: list[Box], routes: list[Route]) -> tuple[float, ...]:
    """Rows of ghosts are close together; lines that cross between two rows have more room."""
    rows: dict[int, list[Box]] = defaultdict(list)
    for box in boxes:
        rows[box.row].append(box)
    steps = []
    for row in range(1, len(rows)):
        ghosts = all(box.ghost for box in rows[row])
        arriving = [k for k in routes if k.target.row == row and (k.track is None or len(rows[row]) > 1)]
        swaying = sum((k.source.x if k.track is None else k.track) != k.target.x for k in arriving)
        steps.append(-GHOST_PITCH if ghosts else -PITCH - min(SWAY[0] * swaying, SWAY[1]))
    return tuple(itertools.accumulate(steps, initial=0.0))


# -- boxes side by side ------------------------------------------------------------------------------------------------


def _side_by_side(boxes: dict[int, Box], links: list[Link], apart: float) -> dict[int, Box]:
    """Each box below the middle of those it reads, as far as there is room, or else on the right; row by row."""
    before: dict[int, list[int]] = defaultdict(list)
    for link in links:
        if boxes[link.source].row < boxes[link.target].row:
            before[link.target].append(link.source)
    placed: dict[int, float] = {}
    for own in _by_row({layer: box.row for layer, box in boxes.items()}):
        below = {layer: median(placed[b] for b in before[layer]) for layer in own if before[layer]}
        right = max(below.values()) + apart if below else 0.0
        wanted = sorted((below.get(layer, right), layer) for layer in own)
        places = [round(x, 6) for x in spread_out([x for x, _ in wanted], apart)]  # equal places are to be equal
        placed |= zip((layer for _, layer in wanted), places, strict=True)
    return {layer: replace(box, x=placed[layer]) for layer, box in boxes.items()}


def spread_out(wanted: list[float], apart: float) -> list[float]:
    """Places at least `apart` from each other, as near as possible to the wanted ones, which are sorted.

    >>> spread_out([0.0, 0.0, 5.0], 2.0)
    [-1.0, 1.0, 5.0]
    """
    pools: list[list[float]] = []  # neighbours that touch move as one, to their mean
    for index, place in enumerate(wanted):
        pools.append([place - index * apart])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = [fmean(pool) for pool in pools for _ in pool]
    return [place + index * apart for index, place in enumerate(flat)]


# -- tracks ------------------------------------------------------------------------------------------------------------


def _tracks(routes: list[Route], boxes: list[Box], width: float) -> list[Route]:
    """Give every bundle that is not straight a track, short ones first."""
    straight: dict[tuple[int, int], Route] = {}
    bundles: dict[tuple[int, str, str, bool], list[Route]] = defaultdict(list)
    for route in sorted(routes, key=lambda route: route.style == "identity"):
        ends = (route.source.layer, route.target.layer)
        if route.target.row == route.source.row + 1 and ends not in straight:
            straight[ends] = route
        else:
            bundles[route.bundle].append(route)
    result, taken = list(straight.values()), list[tuple[float, str, float, float]]()
    for bundle in sorted(bundles.values(), key=lambda bundle: _rows(bundle)[1] - _rows(bundle)[0]):
        top, bottom = _rows(bundle)[0] + 0.3, _rows(bundle)[1] - 0.3  # half a box is free for the next track
        busy = [(x, label) for x, label, start, stop in taken if start < bottom and top < stop]
        track = _free(bundle, boxes, busy, width)
        taken.append((track, bundle[0].label, top, bottom))
        result += [replace(route, track=track) for route in bundle]
    return result


def _rows(bundle: list[Route]) -> tuple[int, int]:
    """First and last row that the bundle touches."""
    rows = [box.row for route in bundle for box in (route.source, route.target)]
    return min(rows), max(rows)


def _free(bundle: list[Route], boxes: list[Box], busy: list[tuple[float, str]], width: float) -> float:
    """The nearest place where a track runs through no box and along no other track; those have labels or not."""
    source, targets = bundle[0].source, [route.target for route in bundle]
    top, bottom = _rows(bundle)
    near = {box.x for box in boxes if top <= box.row <= bottom}
    beside = bottom - top < 2 or any(target.row <= source.row for target in targets)  # next to a straight link
    walls = near if beside else {box.x for box in boxes if top < box.row < bottom}
    taken = [(x, LABELLED if label or bundle[0].label else TRACK) for x, label in busy]
    places = {source.x, *(t.x for t in targets), *(x + math.copysign(apart, x - source.x) for x, apart in taken)}
    places |= {x + sign * (width / 2 + FIRST_TRACK) for x in near for sign in (1, -1)}
    middle = fmean([target.x for target in targets])

    def cost(x: float) -> tuple[float, float]:
        return round(abs(x - source.x) + abs(x - middle) + LEFT * (x < source.x >= 0), 6), x

    return next(
        x
        for x in sorted(places, key=cost)
        if all(abs(x - wall) > width / 2 + TRACK / 2 for wall in walls)
        and all(abs(x - other) > apart - TRACK / 10 for other, apart in taken)
    )
