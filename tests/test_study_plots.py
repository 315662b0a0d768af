"""Contract of `gmn.study_plots`.

* Every picture is written as PNG, also of sparse studies: nulls, missing groups, nothing at all; nothing else is left.
* Lines, bars, bands and error bars stand where the study's numbers are; groups go from near to far, "all" last.
* Names of layers do not overlap; axes say what they show; legends are outside the axes and inside the picture.
* A list of another length, an unknown group, and an accuracy in per cent are refused.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from gmn import study_plots as plots
from gmn.errors import GmnError
from gmn.plots import save_figure
from gmn.settings_vote import Row

LAYERS = ["conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2))]  # 19
VOTES = [0.1, 0.3, 0.4, 0.8]


def iou_study(layers: list[str] = LAYERS, groups: str = "12345") -> dict[str, Any]:
    values = {g: [0.9 - 0.1 * int(g) - 0.01 * place for place in range(len(layers))] for g in groups}
    spread = [0.02] * len(layers)
    return {
        "title": "IoU of two tasks",
        "layers": layers,
        "groups": {g: {"mean": mean, "std": spread, "pairs": 1000 * int(g)} for g, mean in values.items()},
    }


def recall_study() -> dict[str, Any]:
    group = {"b_mean": VOTES, "b_std": [0.1] * 4, "d_mean": [3.0, 1.0, 2.0, 5.0, 8.0]}
    return {
        "title": "Recall",
        "neighbours": 4,
        "groups": {"all": group, "5": group, "1": {**group, "b_mean": [0.2, None, 0.6, 1.0]}},
        "layers": {name: {"b_mean": VOTES} for name in LAYERS[:7]},
    }


def lines_study() -> dict[str, Any]:
    return {
        "title": "Steps",
        "xlabel": "fine-tuning steps",
        "log": True,
        "x_ticks": [10, 100, 1000],
        "series": {
            "MVP": {"x": [10, 100, 1000], "mean": [0.7, 0.88, 0.89], "std": [0.05, 0.02, 0.01]},
            "random": {"x": [10, 100], "mean": [0.2, None], "std": [None, None]},
        },
        "references": {"not pruned": 0.93},
    }


def bars_study() -> dict[str, Any]:
    groups = ["1 (nearest)", "2", "3", "4", "5 (farthest)"]
    series = {name: {"mean": [0.9, 0.8, None, 0.6, 0.5], "std": [0.1, 0.1, None, 0.1, 0.1]} for name in "ab"}
    return {"title": "S", "xlabel": "group", "groups": groups, "series": series, "references": {"random": 0.33}}


KINDS: dict[str, tuple[Callable[[Any], Figure], dict[str, Any]]] = {
    "iou": (plots.iou_figure, iou_study()),
    "recall": (plots.recall_figure, recall_study()),
    "recall_layers": (plots.recall_layers_figure, recall_study()),
    "lines": (plots.lines_figure, lines_study()),
    "bars": (plots.bars_figure, bars_study()),
}
EMPTY: dict[str, dict[str, Any]] = {
    "iou": {"title": "t", "layers": LAYERS, "groups": {}},
    "recall": {"title": "t", "neighbours": 4, "groups": {"1": {}, "all": {"b_mean": [None] * 4}}},
    "recall_layers": {"title": "t", "neighbours": 4, "layers": {}},
    "lines": {"title": "t", "xlabel": "x", "log": True, "x_ticks": None, "series": {}},
    "bars": {"title": "t", "xlabel": "x", "groups": [], "series": {}, "references": {}},
}


def drawn(figure: Figure) -> Figure:
    """The figure laid out, as it will be saved."""
    FigureCanvasAgg(figure).draw()
    return figure


def ys(axes: Axes, line: int) -> list[float]:
    return [float(y) for y in axes.lines[line].get_ydata()]


def labels_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# -- all pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_written_and_nothing_else(kind: str, tmp_path: Path) -> None:
    draw, study = KINDS[kind]
    path = tmp_path / "deep" / f"{kind}.png"
    assert save_figure(draw(json.loads(json.dumps(study))), path) == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1080
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_of_nothing_is_drawn_too(kind: str, tmp_path: Path) -> None:
    figure = KINDS[kind][0]
    assert save_figure(figure(EMPTY[kind]), tmp_path / "empty.png").stat().st_size > 1000
    empty = drawn(figure(EMPTY[kind]))
    assert not empty.legends
    texts = [text.get_text() for axes in empty.axes for text in axes.texts]
    assert texts == ([] if kind == "recall_layers" else ["no data"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recall_layers"])
def test_legends_hide_no_data_and_no_title(kind: str) -> None:
    study = {**KINDS[kind][1], "title": "How far two tasks agree: ResNet-56 on CIFAR-100, " * 4 + "LEEP"}
    figure = drawn(KINDS[kind][0](study))
    legend = figure.legends[0].get_window_extent()
    assert legend.x1 <= figure.bbox.x1
    assert figure.texts[0].get_text().replace("\n", " ") == study["title"]
    assert figure.texts[0].get_window_extent().x1 < legend.x0
    assert all(axes.get_window_extent().x1 < legend.x0 for axes in figure.axes)


@pytest.mark.parametrize("kind", KINDS)
def test_axes_say_what_they_show(kind: str) -> None:
    figure = KINDS[kind][0](KINDS[kind][1])
    if kind == "recall_layers":
        assert figure.get_supxlabel() == "votes a, of 4 neighbours"
        assert figure.get_supylabel().startswith("b(a): share of channels")
        return
    expected = {
        "iou": ("layer, from input to output", "IoU of the kept channels"),
        "recall": ("votes a, of 4 neighbours", "b(a): share of channels that the target keeps"),
        "lines": ("fine-tuning steps", "accuracy (per cent)"),
        "bars": ("group", "accuracy (per cent)"),
    }
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == expected[kind]


def test_colours_differ_and_get_lighter_with_distance() -> None:
    def lightness(colour: str) -> float:
        r, g, b = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    near_to_far = [lightness(plots.GROUPS[name].colour) for name in "12345"]
    assert all(far - near > 10 for near, far in itertools.pairwise(near_to_far))
    assert len({look.marker for look in plots.GROUPS.values()}) == 6


# -- IoU ---------------------------------------------------------------------------------------------------------------


def test_iou_lines_and_bands() -> None:
    figure = plots.iou_figure(iou_study())
    [axes] = figure.axes
    assert labels_of(figure) == [
        *("1 (nearest): 1,000 pairs", "2: 2,000 pairs", "3: 3,000 pairs", "4: 4,000 pairs"),
        "5 (farthest): 5,000 pairs",
    ]
    assert ys(axes, 0) == iou_study()["groups"]["1"]["mean"]
    assert [line.get_color() for line in axes.lines] == [plots.GROUPS[name].colour for name in "12345"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.8 + 0.02)
    assert band[:, 1].min() == pytest.approx(0.8 - 0.18 - 0.02)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == LAYERS


def test_iou_without_some_numbers() -> None:
    study = iou_study(["a", "b", "c"], "41")
    study["groups"]["1"] |= {"mean": [0.5, None, 0.7], "std": [None, None, 0.1], "pairs": 0}
    study["groups"]["2"] = {"mean": [None, None, None], "std": [None, None, None], "pairs": 0}
    study["groups"]["3"] = None
    del study["groups"]["4"]["std"]
    figure = drawn(plots.iou_figure(study))
    assert labels_of(figure) == ["1 (nearest)", "4: 4,000 pairs"]
    first, second, third = ys(figure.axes[0], 0)
    assert (first, third) == (0.5, 0.7)
    assert math.isnan(second)


def test_iou_axis_keeps_to_what_iou_can_be() -> None:
    study = iou_study(["a", "b"], "1")
    study["groups"]["1"] |= {"mean": [0.95, 0.05], "std": [0.5, 0.5]}
    assert plots.iou_figure(study).axes[0].get_ylim() == (-0.02, 1.02)


@pytest.mark.parametrize("number", [1, 12, 19, 37, 57])
def test_names_of_layers_do_not_overlap(number: int) -> None:
    names = [f"encoder.layers.{at}.attention.projection" for at in range(number)]
    if number == 1:
        names = ["stem"]
    figure = drawn(plots.iou_figure(iou_study(names)))
    labels = figure.axes[0].get_xticklabels()
    assert [text.get_text() for text in labels] == [name.replace("encoder.layers.", "…") for name in names]
    assert all(text.get_window_extent().y0 >= 0 and text.get_window_extent().x0 >= 0 for text in labels)
    turn = math.radians(labels[0].get_rotation())
    height = labels[0].get_fontsize() * figure.dpi / 72
    width = figure.axes[0].get_window_extent().width / (number + 0.2)
    assert height < width * math.sin(turn)


def test_long_names_are_cut_and_stay_apart() -> None:
    names = [f"{part}.layers.{at}.attention.projection" for part in ("encoder", "decoder") for at in range(12)]
    shown = [text.get_text() for text in plots.iou_figure(iou_study(names)).axes[0].get_xticklabels()]
    assert (shown[0], shown[11], shown[12]) == tuple(
        f"{part}.laye.{at}.atte.projection" for part, at in (("enco", 0), ("enco", 11), ("deco", 0))
    )
    assert len(set(shown)) == len(names)


def test_of_hundreds_of_layers_some_are_named() -> None:
    figure = plots.iou_figure(iou_study([f"block{at}" for at in range(200)]))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()][:3] == ["block0", "block4", "block8"]


# -- recall ------------------------------------------------------------------------------------------------------------


def test_recall_lines_and_histogram() -> None:
    figure = plots.recall_figure(recall_study())
    left, right = figure.axes
    assert labels_of(figure) == ["1 (nearest)", "5 (farthest)", "all"]
    near, _, everything = left.containers
    assert [float(y) for y in everything.lines[0].get_ydata()] == VOTES
    assert [round(float(x)) for x in everything.lines[0].get_xdata()] == [1, 2, 3, 4]
    assert math.isnan(near.lines[0].get_ydata()[1])
    low, high = everything.lines[2][0].get_segments()[3]
    assert (low[1], high[1]) == pytest.approx((0.7, 0.9))
    bars = right.containers[2]
    assert [bar.get_height() for bar in bars] == [3, 1, 2, 5, 8]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [0, 1, 2, 3, 4]
    assert bars[0].get_x() >= right.containers[1][0].get_x() + bars[0].get_width() - 1e-9
    assert left.get_ylim() == (-0.02, 1.02)
    assert right.get_ylabel().startswith("d(a): channels")


def test_recall_of_each_layer_has_its_panel() -> None:
    study = recall_study()
    study["layers"]["layer1.0.conv1"] = {"b_mean": [None, 0.5, None, 0.7], "b_std": [None, 0.1, None, 0.1]}
    figure = drawn(plots.recall_layers_figure(study))
    assert [axes.get_title() for axes in figure.axes] == LAYERS[:7]
    assert [float(y) for y in figure.axes[0].lines[0].get_ydata()] == VOTES
    assert [math.isnan(y) for y in ys(figure.axes[1], 0)] == [True, False, True, False]
    assert len({axes.get_ylim() for axes in figure.axes} | {axes.get_xlim() for axes in figure.axes}) == 2
    named = [
        axes.get_title() for axes in figure.axes if any(t.label1.get_visible() for t in axes.xaxis.get_major_ticks())
    ]
    assert named == LAYERS[2:7]


# -- accuracies --------------------------------------------------------------------------------------------------------


def test_lines_are_in_per_cent_with_references() -> None:
    figure = drawn(plots.lines_figure(lines_study()))
    [axes] = figure.axes
    assert labels_of(figure) == ["MVP", "random", "not pruned"]
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "100", "1000"]
    assert axes.yaxis.get_major_formatter()(0.88) == "88"
    assert [float(y) for y in axes.containers[0].lines[0].get_ydata()] == [0.7, 0.88, 0.89]
    [reference] = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(reference.get_ydata()) == [0.93, 0.93]
    colours = {container.lines[0].get_color() for container in axes.containers} | {reference.get_color()}
    assert len(colours) == 3


def test_every_baseline_has_a_line_of_its_own() -> None:
    names = [row for row in get_args(Row) if row != "nearest"]
    study = {**lines_study(), "references": dict.fromkeys(names, 0.5)}
    lines = [line for line in drawn(plots.lines_figure(study)).axes[0].lines if line.get_label() in names]
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}  # type: ignore[attr-defined]
    assert len(looks) == len(names) == 4


def test_a_logarithmic_axis_has_a_place_for_no_steps() -> None:
    study = lines_study()
    study["series"]["MVP"]["x"] = [0, 100, 1000]
    study["x_ticks"] = [0, 100, 1000]
    axes = drawn(plots.lines_figure(study)).axes[0]
    zero, hundred, thousand = (axes.transData.transform((x, 0.5))[0] for x in (0, 100, 1000))
    assert axes.bbox.x0 < zero < hundred < thousand < axes.bbox.x1
    assert zero - axes.bbox.x0 < 0.1 * axes.bbox.width
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "100", "1000"]


def test_lines_on_a_plain_axis() -> None:
    study = {**lines_study(), "log": False, "x_ticks": None}
    del study["references"]
    figure = drawn(plots.lines_figure(study))
    assert figure.axes[0].get_xscale() == "linear"
    assert labels_of(figure) == ["MVP", "random"]


def test_bars_stand_on_zero_and_show_their_value() -> None:
    figure = drawn(plots.bars_figure(bars_study()))
    [axes] = figure.axes
    assert axes.get_ylim()[0] == 0
    assert labels_of(figure) == ["a", "b", "random"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == bars_study()["groups"]
    values = [text.get_text() for text in axes.texts if text.get_text()]
    assert values == ["90.0", "80.0", "60.0", "50.0"] * 2
    first, second = (next(c for c in axes.containers if c.get_label() == name) for name in "ab")
    assert [bar.get_height() for bar in first][:2] == [0.9, 0.8]
    assert first[0].get_x() + first[0].get_width() == pytest.approx(second[0].get_x())
    assert second[0].get_x() == pytest.approx(0)


def test_many_bars_have_no_room_for_values() -> None:
    study = bars_study()
    study["series"] = {f"{steps} steps": study["series"]["a"] for steps in (20, 40, 60, 80)}
    assert not plots.bars_figure(study).axes[0].texts


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(kind: str, place: str, value: Any) -> dict[str, Any]:
    study = copy.deepcopy(KINDS[kind][1])
    *way, last = place.split("/")
    entry = study
    for key in way:
        entry = entry[key]
    entry[last] = value
    return study


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [
        ("iou", "groups/1/mean", [0.5], "wrong length: expected 19; got 1; in mean"),
        ("iou", "groups/6", {"mean": [0.5] * 19}, "unknown group of similarity: expected 1, 2, 3, 4, 5, all; got 6"),
        ("recall", "groups/all/d_mean", [1.0] * 4, "wrong length: expected 5; got 4; in d_mean"),
        ("recall_layers", "layers/conv1/b_mean", [1.0] * 5, "wrong length: expected 4; got 5; in b_mean"),
        ("lines", "series/MVP/std", [0.1], "wrong length: expected 3; got 1; in std"),
        ("lines", "series/MVP/mean", [70.0, 88.0, 89.0], "no share of 1: expected 0 to 1; got 70; in MVP"),
        ("lines", "references/not pruned", 93, "no share of 1: expected 0 to 1; got 93; in not pruned"),
        ("bars", "series/b/mean", [-0.1] * 5, "no share of 1: expected 0 to 1; got -0.1; in b"),
        ("bars", "groups", ["1", "2"], "wrong length: expected 2; got 5; in mean"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kind: str, place: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(GmnError, match=message):
        KINDS[kind][0](changed(kind, place, value))
