"""What each of two processes does for `test_distributed`, and one alone; started as `python crew.py FOLDER`."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gmn
from gmn.data import Augment, Data
from gmn.distributed import leader_writes, team
from gmn.jsonl import append_line
from gmn.meta_train import DataModel, train_metanetwork
from gmn.settings import Fit, MetaTrain
from gmn.training import evaluate

META = {"epochs": 2, "steps_per_epoch": 3, "batch_size": 15, "lr": 0.01, "pruner_reg": 0.1}
WAYS: dict[str, MetaTrain] = {
    "one": MetaTrain(**META, batches=1),
    "stretches": MetaTrain(**META, batches=3),  # the second mini-batch is shared, the others are not
    "models": MetaTrain(**META, batches=4, models=2, distill=0.5),
}
FIT = Fit(epochs=2, lr=0.1, batch_size=32)
AUGMENT = Augment(crop=1, flip=True)


def digits() -> Data:
    return gmn.load_data("digits", limit=150)


def subject(data: Data, seed: int) -> DataModel:
    torch.manual_seed(seed)
    model = gmn.build_network("cifar.resnet8", num_classes=10, in_channels=1, options={"width": 4}).eval()
    graph = gmn.to_graph(model, data.example_inputs())
    return DataModel(model, graph, gmn.Importance(graph.spec, gmn.couplings(graph.spec)))


def learnt(data: Data, config: MetaTrain) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The metanetwork after six steps on three data models, and what was logged."""
    subjects = [subject(data, seed) for seed in range(3)]
    spec, log = subjects[0].graph.spec, []
    torch.manual_seed(7 + team().rank)  # two processes begin with two metanetworks
    metanetwork = gmn.MetaNetwork(gmn.MetaNetworkConfig(len(spec.columns), spec.edge_kinds, layers=2, hidden=8))
    # AdamW divides a gradient by its own size: with the usual eps, rounding errors of a gradient of 0 become steps
    optimizer = torch.optim.AdamW(metanetwork.parameters(), lr=config.lr, eps=1e-3)
    more: dict[str, Any] = {"augment": AUGMENT, "optimizer": optimizer, "log": log.append}
    train_metanetwork(metanetwork, subjects, data.train, config, seed=3, **more)
    return metanetwork.state_dict(), log


def without_batch_norms() -> nn.Module:
    torch.manual_seed(5 + team().rank)
    unused = nn.Linear(2, 2)
    return nn.ModuleDict(
        {"net": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), "u": unused}
    )


class Called(nn.Module):
    """A network with a parameter that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = without_batch_norms()

    def forward(self, images: Tensor) -> Tensor:
        return self.parts["net"](images)  # type: ignore[index]


def fitted(data: Data, model: nn.Module, config: Fit = FIT) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    log: list[dict[str, float]] = []
    gmn.fit(model, data.train, config, seed=2, augment=AUGMENT, log=log.append)
    return model.state_dict(), log


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except gmn.GmnError as error:
        return str(error)
    return ""


def everything(folder: Path) -> dict[str, Any]:
    data = digits()
    found: dict[str, Any] = {name: learnt(data, config) for name, config in WAYS.items()}
    found["fit"] = fitted(data, Called())
    found["normed"] = fitted(data, subject(data, 0).model)
    found["evaluation"] = evaluate(subject(data, 1).model, data.val, batch_size=40)
    return found


def together(folder: Path) -> dict[str, Any]:
    """What makes sense for several processes only."""
    found, data = everything(folder), digits()
    rank = team().rank
    seen_before = (folder / "lines.jsonl").exists()
    append_line(folder / "lines.jsonl", {"by": rank})
    found["files"] = seen_before, (folder / "lines.jsonl").read_text()
    leader_writes(lambda: (folder / "who.txt").write_text(str(rank)))()  # type: ignore[arg-type, return-value]
    found["who"] = (folder / "who.txt").read_text()
    network = nn.Linear(2, 2)
    team().agree(network.state_dict().values())
    team().refuse_different(network, "networks")
    with torch.no_grad():
        network.bias += rank * 1e-7 + rank
    found["different"] = refusal(lambda: team().refuse_different(network, "networks"))
    found["odd"] = refusal(lambda: gmn.fit(network, data.train, FIT.model_copy(update={"batch_size": 33})))
    three = MetaTrain(**META, batches=3, models=3)
    found["uneven"] = refusal(lambda: learnt(data, three))
    return found


def free_port() -> int:
    """A port below those that connections are given: one of theirs may be taken before the first process listens.

    Not from `random`, which hypothesis seeds alike in every worker.
    """
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports are taken")


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher would tell so many processes."""
    port = str(free_port())
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [{**common, "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(count), **own} for own in ranks]


def start(commands: Sequence[Sequence[str]], **more: Any) -> list[subprocess.Popen[str]]:
    """A process for each command, told that they are together."""
    pipes: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
    own = zip(commands, environments(len(commands)), strict=True)
    return [subprocess.Popen([sys.executable, *command], env=environment, **pipes) for command, environment in own]


if __name__ == "__main__":
    from gmn.distributed import launched

    here = Path(sys.argv[1])
    with launched("cpu", "metanetwork") as crew:
        torch.save(together(here), here / f"{crew.rank}.pt")
