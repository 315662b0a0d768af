"""Networks by name, and their weights from a file.

Names: `cifar.resnet20`, `cifar.vgg19_bn`, `torchvision.resnet50`, `timm.vit_base_patch16_224`, or a
function of one's own, `package.module:function`.
"""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gmn.cifar import VGG_STAGES, CifarResNet, CifarVGG
from gmn.errors import CheckpointError, NetworkError
from gmn.names import accepted, import_function, nearest

CIFAR_RESNETS = (8, 14, 20, 32, 44, 56, 110)
"""The depths proposed when a name is unknown; any depth 6n + 2 can be built."""


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
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, ImportError) as problem:
        raise NetworkError("cannot build the network", got=_line(problem), where=name) from problem
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
    return lambda **options: timm.create_model(member, **{"pretrained": False, **options})


def _timm_names() -> list[str]:
    import timm

    return [f"timm.{name}" for name in timm.list_models()]


def _unknown(name: str, valid: list[str]) -> NetworkError:
    families = "cifar.*, torchvision.*, timm.* or package.module:function"
    without_family = [v for v in valid if v.partition(".")[2] == name]
    hint = f"did you mean {' or '.join(map(repr, without_family))}?" if without_family else nearest(name, valid)
    return NetworkError("unknown network", expected=families, got=repr(name), hint=hint)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill the model with the weights of a file, in place; nothing changes when they do not fit.

    Args:
        path: `.safetensors`, or anything `torch.load(weights_only=True)` reads: a state dict, plain or
            under the key `state_dict` or `model`, with or without the `module.` of data parallelism.

    Raises CheckpointError for the file, NetworkError for weights that do not fit or are not finite.
    """
    path = Path(path)
    state = _state_dict(_read(path), path)
    _check_names(model.state_dict(), state, path)
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NetworkError("weights are not finite", got="NaN or infinity", where=f"{name!r} of {path}")
    model.load_state_dict(state, strict=False)  # names and shapes are checked above


# what safetensors and the unpickler raise on torn or foreign bytes
UNREADABLE = (
    safetensors.SafetensorError,
    pickle.UnpicklingError,
    *(RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError("no such file of weights", got=str(path))
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as problem:
        raise CheckpointError(
            "cannot read the weights", got=_line(problem), where=str(path),
            hint="expected a safetensors file or a saved state dict, not a pickled model",
        ) from problem  # fmt: skip


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            "not a state dict", expected="names and tensors", got=type(content).__name__, where=str(path)
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError("not a state dict", expected="tensors", got=f"{kind} at {name!r}", where=str(path))
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): value for name, value in content.items()}


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


def _line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__
