"""Random small networks for `hypothesis`: a stem, a few pieces on images, and a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from reading import learnt, scrambled
from torch import Tensor, nn

Draw = Callable[..., Any]
Piece = tuple[nn.Module, int]  # and the number of channels that come out
WIDTHS = st.sampled_from([4, 6, 8])


class Branches(nn.Module):
    """What comes out of several paths, added, multiplied or side by side."""

    def __init__(self, how: str, *paths: nn.Module) -> None:
        super().__init__()
        self.how, self.paths = how, nn.ModuleList(paths)

    def forward(self, x: Tensor) -> Tensor:
        found = [path(x) for path in self.paths]
        if self.how == "cat":
            return torch.cat(found, 1)
        return found[0] + found[1] if self.how == "add" else found[0] * torch.sigmoid(found[1])


class Halves(nn.Module):
    """One half of the channels gates the other."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)


class Scale(nn.Module):
    """A learnt number per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = learnt(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class OverChannels(nn.Module):
    """A layer that reads its input with the channels last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Two heads over the pixels."""

    def __init__(self, width: int, fused: bool, bias: bool) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, w, bias) for w in ([3 * width] if fused else [width] * 3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        parts = torch.cat([layer(tokens) for layer in self.qkv], -1) if len(self.qkv) == 1 else None
        q, k, v = parts.chunk(3, -1) if parts is not None else (layer(tokens) for layer in self.qkv)
        q, k, v = (t.view(*t.shape[:2], 2, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])


# One draw each; `same`: the size of the images must stay


def convolution(draw: Draw, width: int, same: bool = False) -> Piece:
    out = draw(WIDTHS)
    kernel = draw(st.sampled_from([1, 3, (3, 1)]))
    padding = tuple(k // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
    groups = draw(st.sampled_from([1, 1, 2]))
    stride = 1 if same else draw(st.sampled_from([1, 1, 2]))
    return nn.Conv2d(width, out, kernel, stride, padding, groups=groups, bias=draw(st.booleans())), out


def depthwise(draw: Draw, width: int, same: bool = False) -> Piece:
    return nn.Conv2d(width, width, 3, padding=1, groups=width, bias=draw(st.booleans())), width


def transposed(draw: Draw, width: int, same: bool = False) -> Piece:
    out, kernel = draw(WIDTHS), draw(st.sampled_from([1, 3]))
    return nn.ConvTranspose2d(width, out, kernel, padding=kernel // 2, groups=draw(st.sampled_from([1, 2]))), out


def batch_norm(draw: Draw, width: int, same: bool = False) -> Piece:
    return nn.BatchNorm2d(width, affine=draw(st.booleans())), width


def channel_norm(draw: Draw, width: int, same: bool = False) -> Piece:
    norms = [
        nn.GroupNorm(1, width),
        nn.GroupNorm(2, width),
        OverChannels(nn.LayerNorm(width)),
        OverChannels(nn.RMSNorm(width)),
    ]
    return draw(st.sampled_from(norms)), width


def activation(draw: Draw, width: int, same: bool = False) -> Piece:
    acts = [nn.ReLU(), nn.GELU(), nn.SiLU(inplace=True), nn.PReLU(width), nn.InstanceNorm2d(width, affine=True)]
    return draw(st.sampled_from(acts)), width


def scale(draw: Draw, width: int, same: bool = False) -> Piece:
    return Scale(width), width


def gate(draw: Draw, width: int, same: bool = False) -> Piece:
    hidden = draw(WIDTHS)
    path = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1))
    return Branches("gate", nn.Identity(), path), width


def concatenation(draw: Draw, width: int, same: bool = False) -> Piece:
    (a, one), (b, two) = convolution(draw, width, same=True), convolution(draw, width, same=True)
    paths = [(a, one), (b, two), *([(nn.Identity(), width)] if draw(st.booleans()) else [])]
    return Branches("cat", *(path for path, _ in paths)), sum(size for _, size in paths)


def halves(draw: Draw, width: int, same: bool = False) -> Piece:
    return Halves(), width // 2


def shuffle(draw: Draw, width: int, same: bool = False) -> Piece:
    return nn.ChannelShuffle(2), width


def attention(draw: Draw, width: int, same: bool = False) -> Piece:
    return Attention(width, draw(st.booleans()), draw(st.booleans())), width


def residual(draw: Draw, width: int, same: bool = False) -> Piece:
    hidden, norm = draw(WIDTHS), draw(st.booleans())
    last = nn.Conv2d(hidden, out := draw(st.sampled_from([width, 6])), 1, bias=not norm)
    path = nn.Sequential(
        nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), last, *([nn.BatchNorm2d(out)] if norm else [])
    )
    short = (
        nn.Identity() if out == width and draw(st.booleans()) else nn.Conv2d(width, out, 1, bias=draw(st.booleans()))
    )
    return Branches("add", path, short), out


PLAIN = [convolution, depthwise, transposed, batch_norm, activation, scale, gate, concatenation, residual, attention]
PLAIN += [halves, shuffle]


@st.composite
def networks(draw: Draw, *, norms: bool = True) -> tuple[nn.Module, Tensor]:
    """A network and an input for it; `norms`: also those that mix the channels."""
    width = draw(WIDTHS)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=draw(st.booleans()))]
    for piece in draw(st.lists(st.sampled_from([*PLAIN, *([channel_norm] * norms)]), min_size=1, max_size=5)):
        if width % 4 and piece is halves:
            continue  # every width stays even
        layer, width = piece(draw, width)
        layers.append(layer)
    pooled = draw(st.booleans())
    layers += [nn.AdaptiveAvgPool2d(1 if pooled else 2), nn.Flatten(), nn.Linear(width * (1 if pooled else 4), 3)]
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return scrambled(nn.Sequential(*layers), draw(st.integers(0, 99))), x
