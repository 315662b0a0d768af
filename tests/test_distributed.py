"""Several processes on one recipe.

* two processes end with the metanetwork of one, to 1e-5, and log the same: with a mini-batch that both share, with
  stretches of several, and with a data model each; both hold the same bits, although they began with different ones
* a network without batch norms trains alike in two processes and in one, also with parameters that nothing depends on;
  one with batch norms is the same in both, and trains as in one process that takes its batches in two parts
* the images of an evaluation are shared, and counted once
* only the first process writes, and all find what it wrote
* processes with different bits, and shares that are uneven, are refused in all of them; uneven ones, and a cluster
  beside the launcher, before anything is trained or written
* stretches cut a row of batches into equal parts; a part of a batch has the random numbers that it has in the whole
* the command: one table, one log, one line for a mistake, no process left when one is killed
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import crew
import pytest
import torch
from conftest import TINY
from torch import Tensor

import gmn
from gmn import distributed, launch, pipeline
from gmn.checkpoint import load_json
from gmn.data import Augment
from gmn.distributed import Team
from gmn.meta_shares import shares_of
from gmn.recipe import load_recipe
from gmn.settings import MetaTrain

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

Found = dict[str, Any]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("crew")
    working = crew.start([[str(Path(crew.__file__)), str(folder)]] * 2)
    said = [process.communicate(timeout=120)[1] for process in working]
    assert [process.returncode for process in working] == [0, 0], said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return crew.everything(tmp_path_factory.mktemp("alone"))


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[key], other[key], rtol=tolerance, atol=tolerance) for key in one)


@pytest.mark.parametrize("way", crew.WAYS)
def test_two_processes_learn_the_metanetwork_of_one(both: list[Found], alone: Found, way: str) -> None:
    (first, log), (second, _), (single, alone_log) = both[0][way], both[1][way], alone[way]
    assert same(first, second)
    assert same(first, single, 1e-5)
    begin = crew.learnt(crew.digits(), crew.WAYS[way].model_copy(update={"lr": 1e-12}))[0]
    assert not same(first, begin, 1e-3)  # it has learnt something
    assert len(log) == len(alone_log) == 2
    for ours, theirs in zip(log, alone_log, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_network_without_batch_norms_trains_alike(both: list[Found], alone: Found) -> None:
    (first, log), (second, _), (single, alone_log) = both[0]["fit"], both[1]["fit"], alone["fit"]
    assert same(first, second)
    assert same(first, single, 1e-5)
    assert [ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in zip(log, alone_log, strict=True)] == [True] * 2


def test_a_network_with_batch_norms_trains_as_in_parts(both: list[Found], alone: Found) -> None:
    """Its norms see halves of the batches, as in one process that takes a batch in two parts; running means differ."""
    (first, log), (second, other_log), (single, _) = both[0]["normed"], both[1]["normed"], alone["normed"]
    assert same(first, second)
    assert log == other_log
    data = crew.digits()
    in_parts, parts_log = crew.fitted(data, crew.subject(data, 0).model, crew.FIT.model_copy(update={"accumulate": 2}))
    learnt = [key for key in first if "running" not in key and "num_batches" not in key]
    assert all(torch.allclose(first[key], in_parts[key], atol=1e-5) for key in learnt)
    assert not all(torch.allclose(first[key], single[key], atol=1e-3) for key in learnt)
    assert [ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in zip(log, parts_log, strict=True)] == [True] * 2


def test_an_evaluation_is_shared(both: list[Found], alone: Found) -> None:
    assert both[0]["evaluation"] == both[1]["evaluation"]
    assert both[0]["evaluation"].accuracy == alone["evaluation"].accuracy
    assert both[0]["evaluation"].loss == pytest.approx(alone["evaluation"].loss)


def test_only_the_first_writes(both: list[Found]) -> None:
    assert [found["files"] for found in both] == [(False, '{"by": 0}\n')] * 2
    assert [found["who"] for found in both] == ["0", "0"]


def test_what_cannot_be_shared_is_refused_by_all(both: list[Found]) -> None:
    for found in both:
        assert "hold different networks" in found["different"]
        assert "1 of 2 differ" in found["different"]
        assert "2 processes share equally; got 33" in found["odd"]
        assert "multiple of the 2 processes; got meta_train.models 3" in found["uneven"]


def test_stretches_of_a_row_of_batches() -> None:
    """Three batches of four on two processes: six images each, cut in the second batch."""
    cut = [Team(rank, 2).parts([4, 4, 4]) for rank in (0, 1)]
    rows = [[list(range(4))[next(parts)] for _ in range(3)] for parts in cut if parts]
    assert rows == [[[0, 1, 2, 3], [0, 1], []], [[], [2, 3], [0, 1, 2, 3]]]
    assert Team().parts([4]) is None


def test_data_models_are_dealt_to_the_processes() -> None:
    """Four of them and eight mini-batches on two processes: mini-batch i is for model i mod 4."""
    config = MetaTrain(epochs=1, steps_per_epoch=1, batch_size=5, batches=8, models=4)
    second = shares_of(config, Team(1, 2))
    parts = second.parts(5)
    assert parts
    assert [len(range(5)[next(parts)]) for _ in range(8)] == [0, 5, 0, 5, 0, 5, 0, 5]
    assert list(second.mine) == [1, 3]
    assert sorted(second.draw(4, torch.Generator())) == [0, 1, 2, 3]


def test_a_part_of_a_batch_is_what_it_is_in_the_whole() -> None:
    split = gmn.load_data("digits", limit=40).train
    whole = list(split.batches(8, generator=torch.Generator().manual_seed(1), augment=Augment(crop=2, flip=True)))
    for part in (slice(0, 3), slice(3, 8), slice(8, 8)):
        parts, rng = iter([part] * len(whole)), torch.Generator().manual_seed(1)
        own = list(split.batches(8, generator=rng, augment=Augment(crop=2, flip=True), parts=parts))
        for (images, labels), (few, some) in zip(whole, own, strict=True):
            assert torch.equal(images[part], few)
            assert torch.equal(labels[part], some)


# -- the launcher ------------------------------------------------------------------------------------------------------


def test_what_the_launcher_may_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.processes() == 1  # something else uses these names
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (launch.processes(), launch.rank()) == (2, 0)

    def refused(device: str = "cpu", method: str = "metanetwork", engine: str = "here") -> str:
        with pytest.raises(gmn.GmnError) as caught, distributed.launched(device, method, engine):
            pass
        return str(caught.value)

    assert "--engine ray" in refused(method="vote")
    assert "one device for all processes" in refused(device="cuda:0")
    assert "leave out the launcher, or --engine ray" in refused(engine="ray")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "--multi_gpu" in refused()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "meta_train.bf16" in refused()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "pip install accelerate" in refused()


def run(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    return crew.start([["-m", "gmn", *arguments]] * 2, cwd=folder)


def options() -> list[str]:
    few = ["data_models.val=0", "data_models.initial_speed_up=1.0", "data_models.initial_fit=null"]
    overrides = [*TINY, *few, "finetune.after_meta=null", "report.baselines=[]"]
    return [part for override in overrides for part in ("--set", override)]


def test_the_shortened_quickstart_in_two_processes(tmp_path: Path) -> None:
    working = run(tmp_path, "meta-train", "quickstart", *options())
    (out, said), (other_out, other_said) = [process.communicate(timeout=120) for process in working]
    assert [process.returncode for process in working] == [0, 0], said + other_said
    assert "metanetwork" in out
    assert "validation accuracy" in said
    assert (other_out, other_said) == ("", "")
    folder = tmp_path / "runs" / "quickstart"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["epoch"]) for line in lines if line["event"] == "meta-train"] == [
        ("meta-train", 1),
        ("meta-train", 2),
    ]
    assert [line["epoch"] for line in lines if line["event"] == "select"] == [0, 1, 2]
    assert len([line for line in lines if line["event"] == "result"]) == 1
    assert (folder / "report.html").is_file()
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name]
    result = folder / "models" / "metanetwork-seed0"
    shutil.rmtree(result)
    (folder / "report.json").unlink()
    working = run(tmp_path, "meta-train", "quickstart", "--resume", *options())
    ended = [process.communicate(timeout=120)[1] for process in working]
    assert [process.returncode for process in working] == [0, 0], "".join(ended)
    assert (result / "model.json").is_file()
    assert (folder / "metrics.jsonl").read_text().count('"event": "result"') == 1


LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
}


@pytest.mark.soak
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launchers_of_the_docs_start_two(tmp_path: Path, name: str) -> None:
    port = crew.environments(1)[0]["MASTER_PORT"]
    own = {"accelerate": ["--main_process_port", port], "torchrun": ["--master-port", port]}[name]
    command = [sys.executable, *LAUNCHERS[name], *own, "-m", "gmn", "meta-train", "quickstart", *options()]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)
    assert load_json(tmp_path / "runs" / "quickstart" / "environment.json")["processes"] == 2
    assert (tmp_path / "runs" / "quickstart" / "report.json").is_file()


WAITING = """
from gmn.distributed import launched, team
from gmn.errors import GmnError
from gmn.launch import fail
try:
    with launched("cpu", "metanetwork"):
        print("here", flush=True)
        while True:
            team().total(1.0)
except GmnError as error:
    fail(str(error))
"""


def test_a_killed_process_ends_the_other() -> None:
    first, second = crew.start([["-c", WAITING]] * 2)
    for process in (first, second):
        assert process.stdout
        assert process.stdout.readline() == "here\n"
    second.kill()
    second.communicate()
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 2
    assert [line for line in said.splitlines() if line.startswith("gmn: ")] == [said.strip().splitlines()[-1]]
    assert "another process of the run has ended" in said


ODD = "{epochs: 1, lr: 0.01, batch_size: 33}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([f"data_models.fit={ODD}"], "2 processes share equally; got 33; in data_models.fit"),
        ([f"data_models.initial_fit={ODD}"], "got 33; in data_models.initial_fit"),
        ([f"finetune.after_meta={ODD}"], "got 33; in finetune.after_meta"),
        ([f"finetune.after_prune={ODD}"], "got 33; in finetune.after_prune"),
        (["finetune.after_prune.images_per_epoch=7"], "got 7; in finetune.after_prune"),
        (
            ["data_models.train=3", "meta_train.models=3", "meta_train.batches=3"],
            "multiple of the 2 processes; got meta_train.models 3",
        ),
    ],
)
def test_uneven_shares_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], said: str
) -> None:
    recipe = load_recipe("quickstart", [*TINY, *change])
    monkeypatch.setattr(distributed, "_team", Team(0, 2))  # it talks to nobody before that
    with pytest.raises(gmn.GmnError, match=said):
        pipeline.meta_train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_uneven_shares_are_one_line(tmp_path: Path) -> None:
    first, second = run(tmp_path, "meta-train", "quickstart", *options(), "--set", f"finetune.after_prune={ODD}")
    said = first.communicate(timeout=120)[1]
    second.terminate()
    second.communicate()
    assert first.returncode == 2
    assert said.splitlines()[-1] == (
        "gmn: a batch cannot be shared: expected a batch_size that 2 processes share equally; got 33;"
        " in finetune.after_prune"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_does_not_go_with_a_cluster(tmp_path: Path) -> None:
    first, second = run(tmp_path, "meta-train", "quickstart", "--engine", "ray", *options())
    said = first.communicate(timeout=120)[1]
    second.terminate()
    second.communicate()
    assert first.returncode == 2
    assert said.startswith("gmn: several processes with a cluster: expected one or the other; got 2; leave out the")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


CRASHING = """
import atexit, sys, time
from gmn import cli, pipeline
from gmn.distributed import team
from gmn.errors import GmnError

def meta_train(*_, **__):
    if not team().leads:
        atexit.register(time.sleep, 600)  # as the end of some connections, which waits for the others
        raise GmnError("mistaken") if "--debug" in sys.argv else RuntimeError("odd")
    while True:
        team().total(1.0)

pipeline.meta_train = meta_train
cli.main()
"""


@pytest.mark.parametrize(("options", "said"), [([], "RuntimeError: odd"), (["--debug"], "GmnError: mistaken")])
def test_a_bug_in_one_process_ends_all_at_once(tmp_path: Path, options: list[str], said: str) -> None:
    """So does a mistake that is shown with its traceback."""
    first, second = crew.start([["-c", CRASHING, *options, "meta-train", "quickstart"]] * 2, cwd=tmp_path)
    shown = second.communicate(timeout=120)[1]
    assert second.returncode == 1
    assert "Traceback" in shown
    assert said in shown.splitlines()[-1]
    ended = first.communicate(timeout=60)[1]
    assert first.returncode == (1 if options else 2)
    assert "another process of the run has ended" in ended


def test_a_mistake_is_one_line_of_the_first(tmp_path: Path) -> None:
    """The others leave it time to say it, in which a launcher ends them."""
    first, second = run(tmp_path, "report", "nowhere")
    said = first.communicate(timeout=60)[1]
    second.terminate()
    assert second.communicate()[1] == ""
    assert first.returncode == 2
    assert said.startswith("gmn: a command for one process: got gmn report in several")
    assert said.count("\n") == 1
