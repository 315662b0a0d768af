"""How the lines of a drawing run: the routes of a column as curves, and where their labels stand.

Lengths are inches, x as in `gmn.placement`, y upwards with 0 in the middle of the first row.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from gmn.placement import BOX_HEIGHT, Box, Column, Route

Point = tuple[float, float]
Steps = list[tuple[int, Point]]  # codes of matplotlib.path.Path, and points
MOVE, LINE, CURVE = 1, 2, 4
BEND = 0.3  # radius of a corner
HEAD = 0.1  # a head needs a straight end of this length
LEVEL = BOX_HEIGHT / 5  # a line leaves the side of a box below its middle and arrives above it


@dataclass(frozen=True)
class Stroke:
    """A curve, with or without a head at its end."""

    steps: tuple[tuple[int, Point], ...]
    style: str
    head: bool = True


@dataclass(frozen=True)
class Note:
    """A label that begins at a place."""

    place: Point
    text: str


class Tracer:
    """Turns the routes of one column into strokes and notes; `width` is that of a box."""

    def __init__(self, column: Column, width: float) -> None:
        self.half, self.heights = width / 2, column.heights
        self.in_row: dict[int, list[Box]] = defaultdict(list)
        for box in column.boxes:
            self.in_row[box.row].append(box)
        self.straight = [route for route in column.routes if route.track is None]
        bundles: dict[tuple[int, str, str, bool], list[Route]] = defaultdict(list)
        for route in column.routes:
            if route.track is not None:
                bundles[route.bundle].append(route)
        self.bundles = list(bundles.values())
        self.outermost: dict[tuple[int, str, int], float] = {}  # the track that draws the line that all arrive on
        for route in (route for bundle in self.bundles for route in bundle):
            key, reach = self._arrival(route), abs(_track(route) - route.target.x)
            self.outermost[key] = max(reach, self.outermost.get(key, 0.0))

    def strokes(self) -> list[Stroke]:
        """All lines; a stretch that several links share is drawn once."""
        result = [self._straight(route) for route in self.straight]
        for bundle in self.bundles:
            *near, far = sorted(bundle, key=self._reach)
            result += [self._stroke([], route) for route in near]
            result.append(self._stroke(self._leave(bundle), far))
        return result

    def notes(self) -> list[Note]:
        """One label above a box for all lines that arrive there, and one beside a track that ends at a side."""
        above: dict[Box, set[str]] = defaultdict(set)
        result = []
        for route in self.straight:
            above[route.target].add(route.label)
        for bundle in self.bundles:
            beside = [route for route in bundle if self._side(route.target, route)]
            for route in bundle:
                above[route.target] |= set() if route in beside else {route.label}
            if beside and bundle[0].label:
                first = min(beside, key=lambda route: abs(route.target.row - route.source.row))
                middle = (self._height(first.source) + self._height(first.target)) / 2
                result.append(Note((_track(first) + 0.05, middle), first.label))
        for box, labels in above.items():
            top = self._height(box) + BOX_HEIGHT / 2 + 0.11
            result.append(Note((box.x + 0.06, top), ", ".join(sorted(labels - {""}))))
        return [note for note in result if note.text]

    def _reach(self, route: Route) -> tuple[int, bool]:
        """How far the track is needed: to the gap above a box, or to its side."""
        return abs(route.target.row - route.source.row), bool(self._side(route.target, route))

    def _height(self, box: Box) -> float:
        return self.heights[box.row]

    def _gap(self, row: int) -> float:
        """Free height above a row."""
        return self.heights[row - 1] - self.heights[row] - BOX_HEIGHT if 0 < row < len(self.heights) else 0.0

    def _arrival(self, route: Route) -> tuple[int, str, int]:
        return route.target.layer, route.style, self._side(route.target, route)

    def _side(self, box: Box, route: Route) -> int:
        """1 or -1 if the track is in plain sight of the right or left side of the box, else 0."""
        away = _track(route) - box.x
        if abs(away) < self.half + 1.5 * HEAD:  # no room for a corner and a head
            return 0
        side = 1 if away > 0 else -1
        others = [side * (other.x - box.x) for other in self.in_row[box.row] if other is not box]
        backwards = route.target.row <= route.source.row  # no line can turn round in the gap below a box
        return 0 if any(0 < x < abs(away) + self.half for x in others) and not backwards else side

    def _straight(self, route: Route) -> Stroke:
        """To the next row."""
        start = route.source.x, self._height(route.source) - BOX_HEIGHT / 2
        end = route.target.x, self._height(route.target) + BOX_HEIGHT / 2
        return Stroke(tuple(_swing(start, end)), route.style)

    def _leave(self, bundle: list[Route]) -> Steps:
        """From the source to its track."""
        route = bundle[0]
        box, track, side = route.source, _track(route), self._side(route.source, route)
        y = self._height(box)
        if not side:
            foot = y - BOX_HEIGHT / 2
            return _swing((box.x, foot), (track, foot - self._gap(box.row + 1) * (track != box.x)))
        edge, level = box.x + side * self.half, y - LEVEL
        drops = [self._height(route.target) + LEVEL - level for route in bundle]
        drop = min(drops, key=abs)
        bend = side * min(BEND, abs(track - edge) - HEAD)
        down = max(-BEND, min(BEND, drop / 2))
        return [(MOVE, (edge, level)), (LINE, (track - bend, level)), *_corner((track, level), (-bend, 0), (0, down))]

    def _stroke(self, before: Steps, route: Route) -> Stroke:
        """From the end of `before`, or from the track, into the target."""
        box, track, side = route.target, _track(route), self._side(route.target, route)
        y = self._height(box)
        if not side:
            top = y + BOX_HEIGHT / 2
            steps = _swing((track, top + self._gap(box.row) * (track != box.x)), (box.x, top))
            return Stroke(_join(before, steps), route.style)
        edge, level = box.x + side * self.half, y + LEVEL
        rise = self._height(route.source) - LEVEL - level
        bend = side * min(BEND, abs(track - edge) - HEAD)
        up = max(-BEND, min(BEND, rise / 2))
        steps: Steps = [(MOVE, (track, level + up)), *_corner((track, level), (0, up), (-bend, 0))]
        last = abs(track - box.x) == self.outermost[self._arrival(route)]
        return Stroke(_join(before, [*steps, (LINE, (edge, level))] if last else steps), route.style, head=last)


def _track(route: Route) -> float:
    assert route.track is not None
    return route.track


def _swing(start: Point, end: Point) -> Steps:
    """A curve down that begins and ends upright; a line between points on one upright."""
    if start[0] == end[0]:
        return [(MOVE, start), (LINE, end)]
    above = end[0], end[1] + HEAD
    middle = (start[1] + above[1]) / 2
    return [(MOVE, start), (CURVE, (start[0], middle)), (CURVE, (end[0], middle)), (CURVE, above), (LINE, end)]


def _corner(corner: Point, before: Point, after: Point) -> Steps:
    """A quarter of an ellipse round a corner, from `corner + before` to `corner + after`."""
    near = 0.45  # of the way from the corner: 1 - 4/3 (sqrt 2 - 1)
    points = [(corner[0] + f * d[0], corner[1] + f * d[1]) for f, d in ((near, before), (near, after), (1.0, after))]
    return [(CURVE, point) for point in points]


def _join(before: Steps, after: Steps) -> tuple[tuple[int, Point], ...]:
    """One path: a line where the first part ends and the second begins."""
    return (*before, (LINE, after[0][1]), *after[1:]) if before else tuple(after)
