"""A recipe at work in a run folder: the data and the networks, each made once and kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmn.bookmark import Bookmark
from gmn.checkpoint import load_model, save_model, saved_facts
from gmn.data import Augment, Data, load_data
from gmn.distributed import team
from gmn.errors import GmnError
from gmn.networks import build_network, load_weights
from gmn.progress import say, track
from gmn.run import UNDER_WAY, Run
from gmn.settings import DEVICES, Common, Fit
from gmn.settings_fit import Section
from gmn.stages import stage
from gmn.state_dict import checksum
from gmn.training import evaluate, fit


class Job:
    """A recipe of any method at work in a run folder: the data, and the networks it makes on the way.

    Args:
        recipe: What to do.
        run: The run folder.
        data: The recipe's data, if they are loaded already.
        place: Where in the run folder networks are kept; its name is in titles and messages.
    """

    def __init__(self, recipe: Common, run: Run, data: Data | None = None, place: str = "") -> None:
        self.common, self.run, self.place = recipe, run, Path(place)
        self.device = choose_device(recipe.device)
        self.data: Data = data or load(recipe, self.device)
        self.augment = Augment(**recipe.data.augment.model_dump())
        self.example = self.data.example_inputs()
        self.source: dict[str, Any] = {
            "name": recipe.network.name,
            "num_classes": self.data.num_classes,
            "in_channels": self.data.input_shape[0],
            "options": recipe.network.options,
        }

    def titled(self, text: str) -> str:
        """With the name of the place in front, if it is not the run folder itself."""
        return f"{self.place.name}: {text}" if self.place.name else text

    def seed(self, index: int) -> int:
        """The seed of network `index`."""
        return self.common.seed * 1000 + index

    def keep(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The network saved under this name in the run folder; made and saved if it is not there yet."""
        name = (self.place / name).as_posix()
        folder = self.run.folder / name
        if saved_facts(folder) is None:
            with stage(self.run.log, "network", network=name):
                model = make().eval()
            score = evaluate(model, self.data.val).accuracy
            # in this order: killed in between, the network is made again, and logged once
            self.run.log("network", name=name, validation_accuracy=score)
            save_model(folder, model, self.source, validation_accuracy=score, input_shape=self.data.input_shape)
            self.run.forget()
            say(f"{name}: validation accuracy {score:.2%}")
        return load_model(folder).to(self.device)

    def built(self, index: int) -> nn.Module:
        """Network `index` before any training, with the recipe's weights if it has some."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed(index))
            model = build_network(**self.source).to(self.device)
        if self.common.network.weights:
            load_weights(model, self.common.network.weights)
        return model.eval()

    def beginning(self, model: nn.Module, settings: Section, index: int, title: str) -> str:
        """A name for a training: a digest of what it begins with."""
        return checksum(model.state_dict(), [title, self.seed(index), settings.model_dump()])[:16]

    def bookmark(self, name: str) -> Bookmark | None:
        """Where a training is kept while it is under way; nowhere if several processes share it."""
        path = self.run.folder / UNDER_WAY / name
        return Bookmark(path, self.common.checkpoint_every) if team().size == 1 else None

    def fit(self, model: nn.Module, settings: Fit, index: int, title: str, **more: Any) -> None:
        """Train in place with the recipe's augmentation; `more` (teacher, regularize) goes to `gmn.training.fit`."""
        title = self.titled(title)
        own = {"seed": self.seed(index), "augment": self.augment, "title": title}
        own["bookmark"] = self.bookmark(self.beginning(model, settings, index, title))
        fit(model, self.data.train, settings, **own, log=self.run.logger("fit", title=title), **more)


def load(recipe: Common, device: torch.device) -> Data:
    """The recipe's data; of several processes one downloads them first."""
    settings = recipe.data.model_dump(exclude={"augment"})
    with track(f"loading {recipe.data.name}", 1), team().leader_first() if recipe.data.download else nullcontext():
        return load_data(**settings, seed=recipe.seed).to(device)


def choose_device(name: str) -> torch.device:
    """`auto` takes the accelerator if there is one; GmnError if there is no such device."""
    if not re.fullmatch(DEVICES, name):
        raise GmnError("no such device", expected="auto, cpu, cuda or cuda:N", got=repr(name))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices"
        raise GmnError("no such device", expected=name, got=found, hint="use device: auto or cpu")
    return device
