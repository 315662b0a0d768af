"""Networks by name, and their weights from a file.

Names: `cifar.resnet20`, `cifar.vgg19_bn`, `torchvision.resnet50`, `timm.vit_base_patch16_224`, or a
function of one's own, `package.module:function`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gmn.cifar import VGG_STAGES, CifarResNet, CifarVGG
from gmn.errors import GmnError, NetworkError, no_memory, one_line
from gmn.names import accepted, import_function, nearest
from gmn.state_dict import read_state_dict

CIFAR_RESNETS = (8, 14, 20, 32, 44, 56, 110)
"""The depths proposed when a name is unknown; any depth 6n + 2 can be built."""

UNSAFE = ("pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Options of timm that name files, to unpickle or to write; so does `pretrained_cfg` if it is no tag."""
FETCHING = ("weights", "weights_backbone", "pretrained", "pretrained_cfg", *UNSAFE)
"""Options that only load weights."""


def build_network(
    name: str, *, num_classes: int, in_channels: int = 3, options: dict[str, Any] | None = None
) -> nn.Module:
    """An untrained network by name.

    Args:
        name: `cifar.*`, `torchvision.*`, `timm.*` or `package.module:function`; the function gets
            `num_classes` and `in_channels` as keywords where its signature takes them, and the options.
        options: further keyword arguments of the network, such as `{"shortcut": "B"}`.

    Weights are drawn from torch's random state: seed it before. Raises NetworkError.

    >>> build_network("cifar.resnet20", num_classes=10).linear
    Linear(in_features=64, out_features=10, bias=True)
    """
    if num_classes < 1 or in_channels < 1:
        raise NetworkError("a network needs classes and channels", got=f"{num_classes} classes, {in_channels} channels")
    constructor, arguments = _constructor(name, num_classes, in_channels)
    try:
        model = constructor(**{**arguments, **(options or {})})
    except GmnError:
        raise
    except Exception as problem:  # whatever a library raises for options that it does not check
        if no_memory(problem):
            raise
        raise NetworkError("cannot build the network", got=one_line(problem), where=name) from problem
    if not isinstance(model, nn.Module):
        raise NetworkError("not a network", expected="an nn.Module", got=type(model).__name__, where=name)
    return model


def _constructor(name: str, num_classes: int, in_channels: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    arguments = {"num_classes": num_classes, "in_channels": in_channels}
    if ":" in name:
        function = import_function(name, NetworkError)
        return function, accepted(function, arguments)
    family, _, member = name.partition(".")
    if family == "cifar":
        return _cifar(name, member), arguments
    if family == "torchvision":
        return _torchvision(name, member, in_channels), {"num_classes": num_classes}
    if family == "timm":
        return _timm(name, member), {"num_classes": num_classes, "in_chans": in_channels}
    raise _unknown(name, [*_cifar_names(), *_torchvision_names(), *_timm_names()])


def _cifar(name: str, member: str) -> Callable[..., nn.Module]:
    if match := re.fullmatch(r"resnet(\d+)", member):
        return lambda **options: CifarResNet(int(match[1]), **options)
    if (match := re.fullmatch(r"vgg(\d+)_bn", member)) and int(match[1]) in VGG_STAGES:
        return lambda **options: CifarVGG(int(match[1]), **options)
    raise _unknown(name, _cifar_names())


def _cifar_names() -> list[str]:
    return [f"cifar.resnet{d}" for d in CIFAR_RESNETS] + [f"cifar.vgg{d}_bn" for d in VGG_STAGES]


def _torchvision(name: str, member: str, in_channels: int) -> Callable[..., nn.Module]:
    from torchvision import models  # seconds to import, so only for those who ask

    if name not in (names := _torchvision_names()):
        raise _unknown(name, names)
    if in_channels != 3:
        hint = "take the network from timm"
        raise NetworkError("torchvision networks take 3 channels", got=str(in_channels), where=name, hint=hint)
    taken = inspect.signature(models.get_model_builder(member)).parameters
    untrained = {key: None for key in ("weights", "weights_backbone") if key in taken}
    return lambda **options: models.get_model(member, **{**untrained, **options})


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [f"torchvision.{name}" for name in models.list_models()]


def _timm(name: str, member: str) -> Callable[..., nn.Module]:
    import timm  # seconds to import, so only for those who ask

    if not timm.is_model(member):
        raise _unknown(name, _timm_names())

    def create(**options: Any) -> nn.Module:
        unsafe = [key for key in UNSAFE if key in options]
        unsafe += [] if isinstance(options.get("pretrained_cfg", ""), str) else ["pretrained_cfg"]
        if unsafe:
            hint = "give weights in network.weights, with --weights, or to gmn.load_weights"
            raise NetworkError("options that read files past gmn", got=", ".join(unsafe), where=name, hint=hint)
        return timm.create_model(member, **{"pretrained": False, **options})

    return create


def _timm_names() -> list[str]:
    import timm

    return [f"timm.{name}" for name in timm.list_models()]


def without_fetching(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a file may state: its weights lie beside them, and it must not make anyone read others.

    >>> without_fetching({"width": 8, "pretrained": True})
    {'width': 8}
    """
    return {key: value for key, value in options.items() if key not in FETCHING}


def _unknown(name: str, valid: list[str]) -> NetworkError:
    families = "cifar.*, torchvision.*, timm.* or package.module:function"
    without_family = [v for v in valid if v.partition(".")[2] == name]
    hint = f"did you mean {' or '.join(map(repr, without_family))}?" if without_family else nearest(name, valid)
    return NetworkError("unknown network", expected=families, got=repr(name), hint=hint)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill the model with the weights of a file, in place; nothing changes when they do not fit.

    Args:
        path: What `gmn.state_dict.read_state_dict` reads.

    Raises CheckpointError for the file, NetworkError for weights that do not fit or are not finite.
    """
    path = Path(path)
    state = read_state_dict(path)
    _check_names(model.state_dict(), state, path)
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NetworkError("weights are not finite", got="NaN or infinity", where=f"{name!r} of {path}")
    model.load_state_dict(state, strict=False)  # names and shapes are checked above


def _check_names(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], path: Path) -> None:
    # num_batches_tracked is a counter that older checkpoints lack and no prediction depends on
    missing = [name for name in expected if name not in got and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in got if name not in expected]
    misshapen = [
        f"{name} of shape {list(expected[name].shape)} (found {list(value.shape)})"
        for name, value in got.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise NetworkError("the weights do not fit the network", got="; ".join(problems), where=str(path))


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
