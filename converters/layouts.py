"""Which features nodes and edges have: one layout for every network, and those of the paper's experiments."""

from __future__ import annotations

from gmn.builder import Layout

_NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
_SHORTCUT = tuple(f"shortcut.{name}" for name in _NORM)
_HEADS = ("q.bias", "k.bias", "v.bias")
_ABSENT = (1.0, 0.0, 0.0, 1.0)  # a norm that does nothing

LAYOUTS: dict[str, Layout] = {
    # 15 node features; every kernel size has its own encoder; identity residuals as diagonals
    "generic": Layout(
        (*_NORM, *_SHORTCUT, "bias", *_HEADS, "scale", "shift", "slope"),
        (*_ABSENT, *_ABSENT, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    ),
    # the same without what only transformers have: 9
    "cnn": Layout((*_NORM, *_SHORTCUT, "bias"), (*_ABSENT, *_ABSENT, 0.0)),
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
    # 6 / 1, 3, 256: a norm's numbers lie on the nodes of the residual stream that it reads
    "vit": Layout(("norm.weight", "norm.bias", "bias", *_HEADS), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), norms="stream"),
}
