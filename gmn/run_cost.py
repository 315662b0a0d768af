"""What a run with a metanetwork cost: meta-training, and one pruning by each row, from the lines in its log.

    C(N) = P + A / N          minutes per network, when N networks are pruned
    N*   = ceil(A / (Q - P))  from so many networks on it is not above Q, the pruning by a row without metanetwork

A: meta-training and the choice of the checkpoint, with the training of the data models or without it; 0 for rows
without a metanetwork. P: one pruning: initial pruning (for rows that begin with it), rewriting, first fine-tuning,
pruning, last fine-tuning. There is an N* only if Q > P. (GMN, appendix A.4, figure 8.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from gmn.errors import CheckpointError
from gmn.jsonl import read_lines
from gmn.stages import EVENT, Spent

METANETWORK = "metanetwork"
LEARNT = "learnt"
"""Event: where the metanetwork of a row came from, and what it cost there."""
DATA_MODELS = "data models"
META_PARTS = (DATA_MODELS, "meta-training", "choosing")
STAGES = ("initial pruning", "rewriting", "first fine-tuning", "pruning", "last fine-tuning")
MEASURED = ("seconds", "peak_mb", "cuda_mb")
Line = dict[str, Any]


@dataclass(frozen=True)
class Pruning:
    """One pruning by a row to a speed-up: its stages, seconds averaged over `seeds` seeds, and the highest peaks."""

    row: str
    speed_up: float | None
    seeds: int
    stages: dict[str, Spent]

    @property
    def whole(self) -> Spent:
        """All stages together."""
        return total(self.stages.values())


def total(parts: Iterable[Spent]) -> Spent:
    """Times added up, of peaks the highest."""
    return reduce(add, parts, Spent())


def amortised(pruning: float, learning: float, networks: int) -> float:
    """P + A / N, in the unit of both.

    >>> amortised(10.0, 100.0, 5)
    30.0
    """
    return pruning + learning / networks


def break_even(pruning: float, learning: float, other: float) -> int | None:
    """ceil(A / (Q - P)), at least 1: the smallest N with P + A / N <= Q; None where there is none.

    >>> break_even(10.0, 100.0, 35.0), break_even(10.0, 100.0, 10.0)
    (4, None)
    """
    return max(1, math.ceil(learning / (other - pruning))) if other > pruning else None


def lines(folder: Path) -> list[Line]:
    """The costs in a run's log; of a stage that was done again, with the same labels, the later line."""
    latest: dict[tuple[tuple[str, Any], ...], Line] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        if line.get("event") == EVENT:
            labels = {key: value for key, value in line.items() if key not in ("time", "event", *MEASURED)}
            latest[tuple(sorted(labels.items()))] = line
    return list(latest.values())


def meta_training(folder: Path, row: str = METANETWORK) -> dict[str, Spent]:
    """What the metanetwork of a row cost, by part, in this run or in the one it came from; nothing if nobody noted it.

    Parts that a stopped run did at different times are added up.
    """
    for entry in read_lines(folder / "metrics.jsonl"):
        if entry.get("event") == LEARNT and entry.get("row") == row:
            return {name: Spent(**spent) for name, spent in entry["parts"].items()}
    found: dict[str, list[Spent]] = {}
    for line in lines(folder) if row == METANETWORK else ():
        of_data = line["stage"] == "network" and "data-models/" in str(line["network"])
        found.setdefault(DATA_MODELS if of_data else line["stage"], []).append(_spent(line))
    return {name: total(found[name]) for name in META_PARTS if name in found} if "meta-training" in found else {}


def prunings(folder: Path) -> list[Pruning]:
    """What one pruning cost, for every row and speed-up that a run has finished with a seed.

    What the speed-ups of a row share counts for each of them: so it would be if the network were pruned once.
    """
    own = [line for line in lines(folder) if "row" in line]
    start = [_spent(line) for line in lines(folder) if line.get("network") == "models/start"]
    done: dict[tuple[float | None, str], list[int]] = {}
    for line in own:
        if line["stage"] == STAGES[-1]:
            done.setdefault((line["speed_up"], line["row"]), []).append(line["seed"])
    found: list[Pruning] = []
    for (speed_up, row), seeds in done.items():
        mine = [line for line in own if line["row"] == row and line["seed"] in seeds]
        mine = [line for line in mine if line.get("speed_up", speed_up) == speed_up]
        parts = {name: [_spent(line) for line in mine if line["stage"] == name] for name in STAGES}
        if parts["rewriting"]:
            parts[STAGES[0]] = start
        means = {name: _mean(costs) for name, costs in parts.items() if costs}
        found.append(Pruning(row, speed_up, len(seeds), means))
    order = list(dict.fromkeys(line["row"] for line in own))  # workers finish in any order
    return sorted(found, key=lambda pruning: (pruning.speed_up or 0, order.index(pruning.row)))


def account(folder: Path, networks: Sequence[int], further: Iterable[str] = ()) -> dict[str, Any]:
    """All costs of a run, as JSON: seconds, MB, and seconds per network over each number of networks.

    Args:
        folder: The run, finished or not.
        networks: Numbers of networks to spread meta-training over.
        further: The rows with a metanetwork of their own, by label.

    Raises:
        CheckpointError: if the log holds no pruning.
    """
    found = prunings(folder)
    if not found:
        hint = "runs of an older gmn have none; a run that has not pruned yet: gmn ... --resume"
        raise CheckpointError("the run's log has no costs of a pruning", where=str(folder), hint=hint)
    learnt = {row: meta_training(folder, row) for row in (METANETWORK, *further)}
    return {
        "networks": list(networks),
        "meta_training": {row: _learning(parts) for row, parts in learnt.items()},
        "pruning": [_row(pruning, found, learnt, networks) for pruning in found],
    }


def _row(
    pruning: Pruning, others: Sequence[Pruning], learnt: dict[str, dict[str, Spent]], networks: Sequence[int]
) -> dict[str, Any]:
    whole, content = pruning.whole, {"row": pruning.row, "speed_up": pruning.speed_up, "seeds": pruning.seeds}
    stages = {name: vars(spent) for name, spent in pruning.stages.items()}
    content |= {**vars(whole), "stages": stages, "amortised": {}, "break_even": {}}
    rivals = [other for other in others if other.row not in learnt and other.speed_up == pruning.speed_up]
    for way, seconds in _ways(pruning.row, learnt).items():
        content["amortised"][way] = {str(count): amortised(whole.seconds, seconds, count) for count in networks}
        if pruning.row in learnt:
            against = {other.row: break_even(whole.seconds, seconds, other.whole.seconds) for other in rivals}
            content["break_even"][way] = against
    return content


def _ways(row: str, learnt: dict[str, dict[str, Spent]]) -> dict[str, float]:
    """A of a row in seconds: with the training of the data models, and without; nothing where nobody noted it."""
    if row not in learnt:
        return {"all": 0.0}
    content = _learning(learnt[row])
    if content is None:
        return {}
    ways = {"all": content["seconds"], "without data models": content["seconds_without_data_models"]}
    return ways if DATA_MODELS in learnt[row] else {"all": ways["all"]}


def _learning(parts: dict[str, Spent]) -> dict[str, Any] | None:
    if not parts:
        return None
    rest = total(spent for name, spent in parts.items() if name != DATA_MODELS)
    own = {name: vars(spent) for name, spent in parts.items()}
    return {**vars(total(parts.values())), "seconds_without_data_models": rest.seconds, "parts": own}


def _spent(line: Line) -> Spent:
    return Spent(**{key: line[key] for key in MEASURED})


def _mean(costs: Sequence[Spent]) -> Spent:
    whole = total(costs)
    return Spent(statistics.fmean(cost.seconds for cost in costs), whole.peak_mb, whole.cuda_mb)
