"""Small networks for the suite `extra`, each with one thing that a graph of a network has to get right.

Every one is built without arguments; what it reads stands in `gmn.suites`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# a configuration of Hugging Face
SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 10}
SMALL["intermediate_size"] = 96


class PythonLoop(nn.Module):
    """A loop and a branch in Python: layers of a list, each other one with a residual."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 10]."""
        x = self.stem(x)
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            y = F.relu(norm(layer(x)))
            x = x + y if number % 2 else y
        return self.head(x.mean((2, 3)))


class TiedDecoder(nn.Module):
    """A language model whose decoder is its embedding: one parameter, two modules."""

    def __init__(self, words: int = 50, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.body = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width), nn.LayerNorm(width))
        self.decoder = nn.Linear(width, words)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, words]."""
        x = self.embed(tokens)
        return self.decoder(x + self.body(x))


class CalledTwice(nn.Module):
    """One convolution and one norm, called twice each."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 10]."""
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """A classifier of token sequences: an embedding, a recurrent layer, its last state."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.recurrent = cell(width, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, 10]."""
        states, _ = self.recurrent(self.embed(tokens))
        return self.head(states[:, -1])


def lstm() -> nn.Module:
    """`Recurrent` with an LSTM."""
    return Recurrent(nn.LSTM)


def gru() -> nn.Module:
    """`Recurrent` with a GRU."""
    return Recurrent(nn.GRU)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a concatenation across."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Conv2d(2 * width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 4, H, W]; H and W even."""
        outer = self.outer(x)
        return self.head(torch.cat([outer, self.up(self.inner(F.max_pool2d(outer, 2)))], dim=1))


class Audio(nn.Module):
    """Convolutions along time."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv1d(1, width, 9, stride=4), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Conv1d(width, 2 * width, 3, padding=2, dilation=2), nn.BatchNorm1d(2 * width), nn.ReLU()),
            nn.AdaptiveAvgPool1d(2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, T] to [B, 10]."""
        return self.head(self.features(x).flatten(1))


class Volume(nn.Module):
    """Convolutions in three dimensions, with a residual."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm3d(width)
        self.conv = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, D, H, W] to [B, 10]."""
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.conv(x)).mean((2, 3, 4)))


class Gated(nn.Module):
    """Gated linear units of three makes: SwiGLU, `F.glu`, and one matrix that is split by hand."""

    def __init__(self, width: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)
        self.glu = nn.Linear(width, 2 * width)
        self.norm = nn.RMSNorm(width)
        self.both = nn.Linear(width, 2 * hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 16] to [B, 10]."""
        x = x + self.down(F.silu(self.gate(x)) * self.value(x))
        x = self.norm(x + F.glu(self.glu(x), dim=-1))
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.head(torch.sigmoid(gate) * value)


class SqueezeExcite(nn.Module):
    """An inverted residual whose channels are scaled by a small network of their means."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide))
        self.squeeze, self.excite = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 10]."""
        x = self.stem(x)
        y = F.silu(self.depthwise(self.expand(x)))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + self.project(y)).mean((2, 3)))


class Attentive(nn.Module):
    """A translator: `nn.Transformer` with an input for its encoder and one for its decoder."""

    def __init__(self, words: int = 50, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.transformer = nn.Transformer(width, 2, 2, 2, dim_feedforward=32, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """[B, S] and [B, T] to [B, T, words]."""
        return self.head(self.transformer(self.embed(source), self.embed(target)))


def prelu() -> nn.Module:
    """A convolutional network with learnt slopes, one a channel and one for all; [B, 3, H, W] to [B, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.PReLU(8), nn.Conv2d(8, 16, 3), nn.PReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def group_norm() -> nn.Module:
    """A convolutional network with group and instance norms; [B, 3, H, W] to [B, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def faster_rcnn_backbone() -> nn.Module:
    """The backbone of torchvision's Faster R-CNN: a ResNet-50 with frozen norms and a feature pyramid."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone


def hugging_face_vit() -> nn.Module:
    """A small ViT of Hugging Face; [B, 3, 32, 32] to classes."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SMALL))


def hugging_face_bert() -> nn.Module:
    """A small BERT of Hugging Face that classifies; tokens [B, T] to classes."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=100, **SMALL))
