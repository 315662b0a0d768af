"""Which features nodes and edges have: one layout for every network, and those of the paper's experiments."""

from __future__ import annotations

from gmn.builder import Layout

_NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
_SHORTCUT = tuple(f"shortcut.{name}" for name in _NORM)
_ABSENT = (1.0, 0.0, 0.0, 1.0)  # a norm that does nothing

LAYOUTS: dict[str, Layout] = {
    # 9 node features; every kernel size has its own encoder; identity residuals as diagonals
    "generic": Layout((*_NORM, *_SHORTCUT, "bias"), (*_ABSENT, *_ABSENT, 0.0)),
    # 8 / 9: the CIFAR ResNets of the paper; a classifier's bias takes the norm's bias column
    "resnet56": Layout(
        (*_NORM, *_SHORTCUT),
        (*_ABSENT, *_ABSENT),
        kernels="padded",
        identities="dense",
        bias_column="norm.bias",
    ),
    # 8 / 1, 9, 49
    "resnet50": Layout((*_NORM, *_SHORTCUT), (*_ABSENT, *_ABSENT), bias_column="norm.bias"),
    # 5 / 9
    "vgg19": Layout((*_NORM, "bias"), (*_ABSENT, 0.0), kernels="padded"),
}
