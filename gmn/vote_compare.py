"""The comparison of the vote with its baselines: every method on every target task, at the same number of steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from gmn.checkpoint import save_json, save_model
from gmn.errors import GmnError
from gmn.filter_pruning import Shrunk
from gmn.job import choose_device
from gmn.jsonl import Tail, append_line, checked
from gmn.progress import say, track
from gmn.spread import spread
from gmn.trials import Begun, Finished, Trial, begin, finish, plan
from gmn.vote_job import VoteJob
from gmn.zoo import save_task
from gmn.zoo_build import CPU, stored

TRIAL = get_type_hints(Trial)
Result = dict[str, Any]


def compare_votes(job: VoteJob) -> dict[str, Any]:
    """Run all methods on all targets, measure, and save report.json; finished trials are not run again."""
    recipe = job.recipe
    results = measured(job, planned(job), "comparing")
    built = job.zoo.tasks(split="zoo")
    report = {
        "method": "vote",
        "recipe": recipe.name,
        "ratio": recipe.ratio,
        "similarity": recipe.similarity.name,
        "long": recipe.report.long,
        "targets": {task.name: list(task.class_names) for task in job.targets},
        "base": job.price(),
        "zoo": {"tasks": len(built), "training_flops": sum(task.metrics.get("training_flops", 0.0) for task in built)},
        "validation_images": len(job.data.val),
        "test_images": len(job.data.test),
        "results": results,
    }
    save_json(job.run.folder / "report.json", report)
    return report


def planned(job: VoteJob) -> list[Trial]:
    """The trials of the comparison: every method on every target, for every seed."""
    rows, seeds = ["vote", *job.recipe.report.baselines], range(job.recipe.report.seeds)
    return [plan(job, row, target, seed) for target in job.targets for row in rows for seed in seeds]


def measured(job: VoteJob, wanted: Sequence[Trial], title: str) -> list[Result]:
    """The results of trials, from results.jsonl where they are there, else run now and kept there.

    The job's engine trains and measures networks; this process chooses them, and keeps what is found.

    Raises:
        GmnError: the first of a trial, when all others are done.
    """
    path, failed, remote = job.run.folder / "results.jsonl", list[GmnError](), job.engine.remote
    results = _Results(path)
    data, device = (job.data.to(CPU), partial(choose_device, job.recipe.device)) if remote else (job.data, None)
    with track(title, len(wanted)) as advance:
        for begun, found in job.engine.map(partial(finish, data, device), _missing(job, results, wanted, advance)):
            if isinstance(found, GmnError):
                say(f"{_name(begun.trial)}: {found}")
                failed.append(found)
                continue
            if job.foreign:
                _save(job, begun, found)
            append_line(path, found.result)
            advance(_said(begun.trial, found.result))
    if failed:
        raise failed[0]
    results.look()
    return [results.known[_key(dataclasses.asdict(trial))] for trial in wanted]


def _missing(
    job: VoteJob, results: _Results, wanted: Iterable[Trial], advance: Callable[[str], object]
) -> Iterator[Begun]:
    """The trials that nobody has finished with this zoo, begun when there is room for them.

    Before every trial what was added to the file is read: another process may have finished it, working from the other
    end.
    """
    for trial in wanted:
        results.look()
        result = results.known.get(_key(dataclasses.asdict(trial)))
        if result is None:
            if results.has_with_another_zoo(trial):
                say(f"{_name(trial)}, seed {trial.seed}: made again, since other tasks can vote now")
            begun = begin(job, trial)
            yield dataclasses.replace(begun, model=begun.model.to(CPU)) if job.engine.remote else begun
        else:
            advance(_said(trial, result))


def _name(trial: Trial) -> str:
    return f"{trial.row} on {trial.target}"


def _said(trial: Trial, result: Result) -> str:
    return f"{_name(trial)}: {result['validation_accuracy']:.1%}"


class _Results:
    """The finished trials of a file, by what decides them.

    Attributes:
        known: As of the last look.
    """

    def __init__(self, path: Path) -> None:
        self.known: dict[tuple[Any, ...], Result] = {}
        self._made: set[tuple[Any, ...]] = set()  # with whichever zoo
        self._path, self._tail = path, Tail(path)

    def look(self) -> None:
        """Read what was added; CheckpointError if a line has a trial's names but is not what gmn would have written."""
        for line in self._tail.new():
            if (result := {"zoo": "", **line}).keys() >= TRIAL.keys():  # an older gmn did not say with which zoo
                checked(result, TYPES, self._path)
                self.known[_key(result)] = result
                self._made.add(_key({**result, "zoo": ""}))

    def has_with_another_zoo(self, trial: Trial) -> bool:
        """Whether a trial that is not known was made when other tasks could vote."""
        return _key({**dataclasses.asdict(trial), "zoo": ""}) in self._made


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in TRIAL)


def _save(job: VoteJob, begun: Begun, found: Finished) -> None:
    """Keep the network; that of the vote also as a task that `gmn zoo add` takes."""
    trial, target = begun.trial, begun.task
    source = {**job.source, "num_classes": len(target.classes)}
    facts = {"class_names": list(target.class_names), "input_shape": job.data.input_shape}
    folder = job.run.folder / "models" / f"{trial.row}-seed{trial.seed}"
    save_model(folder, found.model, source, **facts, **found.result)
    if trial.row == "vote" and begun.keep is not None:
        path = job.run.folder / f"task-seed{trial.seed}.safetensors"
        classes = hashlib.sha256(json.dumps(target.class_names).encode()).hexdigest()[:8]
        name = f"target-{classes}-seed{begun.seed}"  # two targets, two names: both can join a zoo
        task = dataclasses.replace(target, name=name, split="zoo", seed=begun.seed)
        shrunk = Shrunk(found.model.to(job.device), begun.keep, found.result["training_flops"])
        save_task(path, stored(job.backbone, job.zoo.identity, job.data_of(target), task, shrunk))
        say(f"to let it vote next time: gmn zoo add {job.folder} {path}")


def summarise(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One entry per method: means over targets and seeds, their spread, and the paired difference from the vote."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result["row"], []).append(result)
    vote = {(r["target"], r["seed"]): r["test_accuracy"] for r in rows.get("vote", [])}
    entries = []
    for row, found in rows.items():
        mean = {key: statistics.fmean(r[key] for r in found) for key in MEANS}
        apart = [r["test_accuracy"] - vote[r["target"], r["seed"]] for r in found if (r["target"], r["seed"]) in vote]
        apart_by = {"spread": spread([r["test_accuracy"] for r in found]), "difference_spread": spread(apart)}
        difference = statistics.fmean(apart) if apart else 0.0
        entries.append({"row": row, "trials": len(found), **mean, **apart_by, "difference": difference})
    return entries


MEANS = (
    *("validation_accuracy", "test_accuracy", "iterations", "neighbours"),
    *("training_flops", "search_flops", "flops", "parameters"),
)
TYPES = dict.fromkeys(MEANS, float) | TRIAL
"""Of a line in results.jsonl."""
