"""Contract of `gmn.drawing`, `gmn.placement` and `gmn.strokes`.

* Every layer is drawn, every link is drawn, once.
* Boxes do not touch; no track runs through a box or along another track.
* A picture shows what it says: colours of the kinds of layers, a residual only where there is one.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from PIL import Image
from test_views import four_nodes
from zoo import graph_of

from gmn.drawing import FILLS, LINES
from gmn.errors import ConversionError
from gmn.placement import BOX_HEIGHT, TRACK, Box, Column, Link, Route, depths, place
from gmn.strokes import Tracer

WIDTH = 1.5


def chain(length: int) -> list[Link]:
    return [Link(i, i + 1, "dense", "3x3") for i in range(length)]


def residuals(length: int) -> list[Link]:
    return [*chain(length), *(Link(i, i + 2, "identity", "") for i in range(1, length - 2, 2))]


def dense_block(length: int) -> list[Link]:
    return [Link(i, j, "identity", "") for j in range(length) for i in range(j)]


def random_links(seed: int) -> list[Link]:
    choose = random.Random(seed)
    pairs = {(choose.randrange(target), target) for target in range(1, 40) for _ in range(choose.randint(1, 3))}
    return [Link(s, t, *choose.choice([("dense", "1"), ("dense", "3x3"), ("identity", "")])) for s, t in sorted(pairs)]


def recurrent() -> list[Link]:
    """Back to an earlier layer, to itself, and twice between the same layers."""
    return [
        *chain(30),
        Link(25, 2, "dense", "1"),
        Link(25, 28, "dense", "1"),
        Link(7, 7, "dense", "1"),
        Link(4, 5, "identity", ""),
    ]


GRAPHS = {"chain": chain(3), "residuals": residuals(60), "dense": dense_block(12), "recurrent": recurrent()}
GRAPHS |= {f"random{seed}": random_links(seed) for seed in range(6)}


def layers_of(links: list[Link]) -> set[int]:
    return {layer for link in links for layer in (link.source, link.target)}


@pytest.fixture(params=GRAPHS.values(), ids=GRAPHS.keys())
def links(request: pytest.FixtureRequest) -> list[Link]:
    return request.param


def test_every_layer_and_every_link_has_one_place(links: list[Link]) -> None:
    columns = place(layers_of(links), links, WIDTH)
    own = [box.layer for column in columns for box in column.boxes if not box.ghost]
    assert sorted(own) == sorted(layers_of(links))
    routes = [route for column in columns for route in column.routes]
    found = [Link(r.source.layer, r.target.layer, r.style, r.label) for r in routes]
    assert sorted(found, key=str) == sorted(links, key=str)
    for column in columns:
        assert {box for route in column.routes for box in (route.source, route.target)} <= set(column.boxes)
        assert not any(route.target.ghost for route in column.routes)


def test_boxes_do_not_touch(links: list[Link]) -> None:
    for column in place(layers_of(links), links, WIDTH):
        for a, b in itertools.combinations(column.boxes, 2):
            assert a.row != b.row or abs(a.x - b.x) > WIDTH
        assert all(above - below > BOX_HEIGHT for above, below in itertools.pairwise(column.heights))


def through(route: Route, box: Box) -> bool:
    """Whether a track runs through a box."""
    rows = sorted((route.source.row, route.target.row))
    assert route.track is not None
    return rows[0] < box.row < rows[1] and abs(route.track - box.x) < WIDTH / 2


def beside(a: Route, b: Route) -> bool:
    """Whether the tracks of two routes that look different lie on each other."""
    assert a.track is not None
    assert b.track is not None
    ends = sorted((min(r.source.row, r.target.row), max(r.source.row, r.target.row)) for r in (a, b))
    return a.bundle != b.bundle and ends[1][0] < ends[0][1] and abs(a.track - b.track) < 0.8 * TRACK


def test_tracks_are_free(links: list[Link]) -> None:
    for column in place(layers_of(links), links, WIDTH):
        tracked = [route for route in column.routes if route.track is not None]
        assert not [(route, box) for route in tracked for box in column.boxes if through(route, box)]
        assert not [pair for pair in itertools.combinations(tracked, 2) if beside(*pair)]


def at_border(column: Column, box: Box, point: tuple[float, float]) -> bool:
    away, up = abs(point[0] - box.x), abs(point[1] - column.heights[box.row])
    return (away, up) == pytest.approx((0, BOX_HEIGHT / 2)) or (
        away == pytest.approx(WIDTH / 2) and up < BOX_HEIGHT / 2
    )


def test_heads_are_where_links_arrive(links: list[Link]) -> None:
    for column in place(layers_of(links), links, WIDTH):
        ends = [stroke.steps[-1][1] for stroke in Tracer(column, WIDTH).strokes() if stroke.head]
        targets = {route.target for route in column.routes}
        assert all(any(at_border(column, box, end) for box in targets) for end in ends)
        assert all(any(at_border(column, box, end) for end in ends) for box in targets)


def test_a_residual_arrives_at_the_side() -> None:
    (column,) = place(range(5), residuals(4), WIDTH)
    ends = [stroke.steps[-1][1] for stroke in Tracer(column, WIDTH).strokes() if stroke.head]
    third = [(x, y) for x, y in ends if abs(y - column.heights[3]) < BOX_HEIGHT]
    assert sorted(third) == [
        (0, column.heights[3] + BOX_HEIGHT / 2),
        (WIDTH / 2, pytest.approx(column.heights[3], abs=0.1)),
    ]


def test_tracks_are_on_the_right() -> None:
    (column,) = place(range(12), dense_block(12), 8 * WIDTH)
    tracks = {route.source.layer: route.track for route in column.routes if route.track is not None}
    assert sorted(tracks, key=tracks.__getitem__) == [*range(9, -1, -1)]  # the longest is outermost
    assert min(tracks.values()) > 4 * WIDTH


def test_rows_go_down_along_the_links() -> None:
    for seed in range(6):
        links = random_links(seed)
        rows = depths(sorted(layers_of(links)), links)
        assert all(rows[link.source] < rows[link.target] for link in links)


def test_parallel_branches_stand_side_by_side() -> None:
    links = [Link(s, t, "dense", "1") for s, t in ((0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4))]
    (column,) = place(range(5), links, WIDTH)
    assert [box.row for box in column.boxes] == [0, 1, 1, 1, 2]
    top, *branches, bottom = (box.x for box in column.boxes)
    assert top == bottom == branches[1]
    assert branches[0] < branches[1] < branches[2]


def test_a_long_network_has_columns_of_like_height() -> None:
    links = [*chain(100), *(Link(i, i + 5, "identity", "") for i in range(0, 96, 5))]
    columns = place(range(101), links, WIDTH)
    rows = [len(column.heights) for column in columns]
    assert len(rows) > 3
    assert max(rows) - min(rows) <= 5
    assert all(sum(box.ghost for box in column.boxes) == 1 for column in columns[1:])  # cut between residuals


def test_columns_are_cut_where_few_links_cross() -> None:
    modules, length = 11, 4  # each of three branches, joined
    links = []
    for first in range(0, modules * 13, 13):
        for branch in (1, 5, 9):
            path = [first, *range(first + branch, first + branch + length), first + 13]
            links += [Link(s, t, "dense", "1") for s, t in itertools.pairwise(path)]
    columns = place(range(modules * 13 + 1), links, WIDTH)
    assert [sum(box.ghost for box in column.boxes) for column in columns] == [0, 1, 1]


# Pictures


def share(path: Path, colour: str) -> float:
    """The part of a picture that has a colour."""
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        wanted = tuple(bytes.fromhex(colour[1:]))
        assert colours is not None
        return sum(count for count, found in colours if found == wanted) / (image.width * image.height)


def test_a_picture_of_a_residual_network(tmp_path: Path) -> None:
    path = graph_of("resnet20B").draw(tmp_path / "a.png")
    assert path == tmp_path / "a.png"
    assert share(path, FILLS["conv"]) > 0.1
    assert 0.0005 < share(path, FILLS["linear"]) < share(path, FILLS["conv"]) / 10  # one of twenty
    assert share(path, FILLS["norm"]) == 0
    assert share(path, LINES["identity"]["color"]) > 0.0005
    assert share(path, LINES["dense"]["color"]) > 0.0005


def test_no_residual_no_colour_of_residuals(tmp_path: Path) -> None:
    assert share(graph_of("vgg19_bn").draw(tmp_path / "a.png"), LINES["identity"]["color"]) == 0


def test_the_page_grows_with_the_network(tmp_path: Path) -> None:
    areas = []
    for name in ("resnet20B", "resnet56B"):
        with Image.open(graph_of(name).draw(tmp_path / f"{name}.png")) as image:
            areas.append(image.width * image.height)
            assert 0.5 < image.height / image.width < 1.5
    assert 2 < areas[1] / areas[0] < 4


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = four_nodes().draw(str(tmp_path / f"a{suffix}"), title=r"$\no_formula$")
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_an_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConversionError, match=rf"expected \.png or \.svg or \.pdf; got '{name}'"):
        four_nodes().draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"folder of the picture does not exist: got .*nowhere"):
        four_nodes().draw(tmp_path / "nowhere" / "a.png")
