"""A picture of a network: layers as boxes from top to bottom, kernels and residuals as lines; matplotlib only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gmn.errors import ConversionError
from gmn.graph import NetworkGraph
from gmn.placement import BOX_HEIGHT, Column, Link, place
from gmn.strokes import Note, Stroke, Tracer
from gmn.views import to_networkx

SUFFIXES = (".png", ".svg", ".pdf")
FILLS = {
    "input": "#d9d9d9",
    "conv": "#bcd9f2",
    "linear": "#fbdfa7",
    "norm": "#bfe6d3",
    "attention": "#d3caf0",
    "merge": "#eecbe0",
    "position": "#e3e8a8",
    "scale": "#bfe3e6",
    "opaque": "#f6c3a8",
}
OTHER_FILL = "#e5dccb"
LINES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#333333", "linestyle": "-"},
    "grouped": {"color": "#333333", "linestyle": (0, (5, 1.2, 1, 1.2))},
    "diagonal": {"color": "#333333", "linestyle": (0, (1, 1.2))},
    "identity": {"color": "#c2410c", "linestyle": (0, (3.5, 1.8))},
}
MEANING = {
    "dense": "weights",
    "grouped": "grouped weights",
    "diagonal": "one weight per channel",
    "identity": "identity (residual, concatenation)",
}
GHOST: dict[str, Any] = {"fc": "white", "ec": "0.6", "ls": "--"}
PATCH: dict[str, Any] = {"fc": "white", "ec": "none", "pad": 0.4}  # behind a label, so that no line runs through it
TITLE, NAME, NOTE = 11.0, 7.0, 6.0  # points
PAD, MARGIN, HEAD = 0.08, 0.35, 0.95  # inches: in a box, around a column, for title and legend


def draw(graph: NetworkGraph, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the layers of a network; PNG, SVG or PDF by the suffix of the path, which is returned.

    A box is a group of nodes: its name, how many, coloured by what makes it. A line is an edge block, labelled with
    its kernel. The page grows with the network and has several columns, read from left to right; a pale box at the
    top of a column stands for a layer of another one.

    Args:
        graph: The graph.
        path: Where to, in a folder that exists.
        title: What stands above; the class of the network and its size unless given.

    Raises:
        ConversionError: if the suffix is another one or the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConversionError("unknown kind of picture", expected=" or ".join(SUFFIXES), got=repr(path.name))
    if not path.parent.is_dir():
        raise ConversionError("the folder of the picture does not exist", got=str(path.parent), hint="create it first")
    picture = to_networkx(graph)
    layers = dict(picture.nodes(data=True))
    links = {Link(source, target, *_look(block)) for source, target, block in picture.edges(data=True)}
    width = max(_width(layer["name"]) + _width(f"{layer['size']}", "bold") for layer in layers.values()) + 3.5 * PAD
    page = _Page(place(layers, links, width), width, _title(graph) if title is None else title)
    page.fill(layers)
    page.save(path)
    return path


def _look(block: dict[str, Any]) -> tuple[str, str]:
    """Style and label of a line."""
    return ("identity", "") if block["identity"] else (block["form"], block["kind"])


def _title(graph: NetworkGraph) -> str:
    name = "" if graph.template is None else f"{type(graph.template).__name__}: "
    return f"{name}{len(graph.spec.groups)} layers, {graph.spec.num_nodes:,} nodes, {graph.spec.num_edges:,} edges"


def _width(text: str, weight: str = "normal", points: float = NAME) -> float:
    """Inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(weight=weight, size=points), False)[0] / 72


class _Page:
    """A figure whose data coordinates are inches, y upwards, and what is drawn into it."""

    def __init__(self, columns: list[Column], width: float, title: str) -> None:
        from matplotlib.figure import Figure

        self.columns, self.width = columns, width
        self.offsets, right = [], MARGIN
        for low, high in (_span(column, width) for column in columns):
            self.offsets.append(right - low)
            right += high - low + 2 * MARGIN
        across = max(right - MARGIN, _width(title, "bold", TITLE) + 2 * MARGIN, 7.0)
        self.size = across, max(BOX_HEIGHT - column.heights[-1] for column in columns) + HEAD + MARGIN
        self.figure = Figure(figsize=self.size)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, self.size[0]), ylim=(0, self.size[1]))
        self.axes.set_axis_off()
        looks: dict[str, Any] = {"fontsize": TITLE, "weight": "bold", "va": "center", "parse_math": False}
        self.axes.text(MARGIN, self.size[1] - 0.3, title, **looks)

    def fill(self, layers: dict[int, dict[str, Any]]) -> None:
        """Draw every column and the legend."""
        for column, offset in zip(self.columns, self.offsets, strict=True):
            origin = offset, self.size[1] - HEAD - BOX_HEIGHT / 2
            tracer = Tracer(column, self.width)
            for stroke in tracer.strokes():
                self._stroke(stroke, origin)
            for note in tracer.notes():
                self._note(note, origin)
            for box in column.boxes:
                self._box(layers[box.layer], (origin[0] + box.x, origin[1] + column.heights[box.row]), box.ghost)
        self._legend({layer["kind"] for layer in layers.values()})

    def save(self, path: Path) -> None:
        """Write the file; a very large page with fewer dots per inch."""
        dots = min(150.0, 20_000 / max(self.size), 7_000 / math.sqrt(self.size[0] * self.size[1]))
        self.figure.savefig(path, format=path.suffix[1:].lower(), dpi=dots)

    def _stroke(self, stroke: Stroke, origin: tuple[float, float]) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path as Curve

        codes, points = zip(*stroke.steps, strict=True)
        curve = Curve([(origin[0] + x, origin[1] + y) for x, y in points], codes)
        head = "-|>,head_length=3,head_width=1.6" if stroke.head else "-"
        looks = {"lw": 1.0, "joinstyle": "miter", "shrinkA": 0, "shrinkB": 0, **LINES[stroke.style]}
        self.axes.add_patch(FancyArrowPatch(path=curve, arrowstyle=head, fc=looks["color"], **looks))

    def _box(self, layer: dict[str, Any], middle: tuple[float, float], ghost: bool) -> None:
        from matplotlib.patches import FancyBboxPatch

        (x, y), half = middle, self.width / 2
        looks: dict[str, Any] = GHOST if ghost else {"fc": _fill(layer["kind"]), "ec": "0.35"}
        style = "round,pad=0,rounding_size=0.08"
        corner = x - half, y - BOX_HEIGHT / 2
        self.axes.add_patch(FancyBboxPatch(corner, self.width, BOX_HEIGHT, boxstyle=style, zorder=3, lw=0.8, **looks))
        text: dict[str, Any] = {"va": "center_baseline", "fontsize": NAME, "zorder": 4, "parse_math": False}
        text["color"] = "0.5" if ghost else "black"
        self.axes.text(x - half + PAD, y, layer["name"], ha="left", **text)
        self.axes.text(x + half - PAD, y, f"{layer['size']}", ha="right", weight="bold", **text)

    def _note(self, note: Note, origin: tuple[float, float]) -> None:
        x, y = origin[0] + note.place[0], origin[1] + note.place[1]
        self.axes.text(x, y, note.text, fontsize=NOTE, color="0.25", va="center", zorder=2.5, bbox=PATCH)

    def _legend(self, kinds: set[str]) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        styles = {route.style for column in self.columns for route in column.routes}
        handles: list[Any] = [Patch(fc=_fill(kind), ec="0.35", label=kind) for kind in sorted(kinds, key=_rank)]
        handles += [Line2D([], [], label=MEANING[style], **LINES[style]) for style in LINES if style in styles]
        if any(box.ghost for column in self.columns for box in column.boxes):
            handles.append(Patch(label="from another column", **GHOST))
        place = MARGIN, self.size[1] - 0.5
        looks: dict[str, Any] = {"frameon": False, "borderpad": 0, "borderaxespad": 0, "handlelength": 2.2}
        looks |= {"fontsize": NAME, "ncols": int(self.size[0] / 1.4), "columnspacing": 1.4}
        data = self.axes.transData
        self.axes.legend(handles=handles, loc="upper left", bbox_to_anchor=place, bbox_transform=data, **looks)


def _fill(kind: str) -> str:
    return FILLS.get(kind, OTHER_FILL)


def _rank(kind: str) -> tuple[int, str]:
    """Order in the legend."""
    return list(FILLS).index(kind) if kind in FILLS else len(FILLS), kind


def _span(column: Column, width: float) -> tuple[float, float]:
    """Left and right end of what is drawn, the label of the outer track included."""
    places = [box.x + side * width / 2 for box in column.boxes for side in (-1, 1)]
    for route in column.routes:
        if route.track is not None:
            places += [route.track, route.track + (0.3 if route.label else 0.0)]
    return min(places), max(places)
