"""Suites of networks for `gmn bench`: which networks, and what each of them reads.

torchvision        every classification network       timm     the smallest network of every family, of 150 M at most
torchvision-video  every network for video            extra    what the others lack: recurrence, tied weights, ...
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gmn.errors import GmnError
from gmn.example import example_inputs
from gmn.names import nearest
from gmn.networks import build_network


@dataclass(frozen=True)
class Input:
    """One argument of a network: random numbers, or with `below` random integers under it."""

    shape: tuple[int, ...]
    below: int = 0

    def make(self, generator: torch.Generator) -> Tensor:
        """Fresh values."""
        if self.below:
            return torch.randint(self.below, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


@dataclass(frozen=True)
class Entry:
    """A network of a suite.

    Attributes:
        name: What it is called in results.
        network: A name for `gmn.build_network`; it is asked for 1000 classes where it has classes.
        inputs: Its arguments; nothing stands for one image of the size that the network was made for.
        options: Keyword arguments of its builder.
        family: The family that it stands for, if any.
        needs: A package that it needs and that gmn does not.
    """

    name: str
    network: str
    inputs: tuple[Input, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    needs: str = ""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Entry:
        """The entry of `dataclasses.asdict`, after a way through JSON."""
        inputs = tuple(Input(tuple(one["shape"]), one["below"]) for one in content["inputs"])
        return cls(**{**content, "inputs": inputs})

    @property
    def missing(self) -> bool:
        """Whether it cannot be built because a package is not installed."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None

    def build(self) -> nn.Module:
        """The network, with weights from torch's random state; NetworkError if it cannot be built."""
        return build_network(self.network, num_classes=1000, options=self.options)

    def example(self, model: nn.Module, seed: int) -> tuple[Any, ...]:
        """Its arguments; another seed gives other numbers."""
        generator = torch.Generator().manual_seed(seed)
        if self.inputs:
            return tuple(one.make(generator) for one in self.inputs)
        return (torch.randn(example_inputs(model).shape, generator=generator),)


def suite(name: str) -> list[Entry]:
    """The networks of a suite; GmnError if there is no suite of that name."""
    if name not in SUITES:
        raise GmnError("unknown suite", expected=", ".join(SUITES), got=repr(name), hint=nearest(name, SUITES))
    return SUITES[name]()


def _torchvision() -> list[Entry]:
    from torchvision import models  # seconds to import, so only for those who ask

    # by default these two warn about their initialisation, and take long for it; their auxiliary heads, which
    # pretrained ones come without, do not run in eval mode, so no tool that runs a network can see them
    bare = {"init_weights": False, "aux_logits": False}
    quick: dict[str, dict[str, Any]] = dict.fromkeys(("googlenet", "inception_v3"), bare)
    names = models.list_models(module=models)  # detection, segmentation and the rest are other modules
    return [Entry(name, f"torchvision.{name}", options=quick.get(name, {})) for name in names]


def _torchvision_video() -> list[Entry]:
    from torchvision import models

    as_published = (Input((1, 3, 16, 112, 112)),)
    small: dict[str, tuple[Input, ...]] = dict.fromkeys(("mc3_18", "r2plus1d_18", "r3d_18"), as_published)
    names = models.list_models(module=models.video)
    return [Entry(name, f"torchvision.{name}", inputs=small.get(name, ())) for name in names]


def _timm() -> list[Entry]:
    import timm

    # an older timm lacks the newer families
    known = [(family, name) for family, name in TIMM.items() if timm.is_model(name)]
    return [Entry(name, f"timm.{name}", options=TIMM_OPTIONS.get(name, {}), family=family) for family, name in known]


def _extra() -> list[Entry]:
    image, tokens = Input((2, 3, 32, 32)), Input((2, 12), below=50)
    own: dict[str, tuple[Input, ...]] = {
        **dict.fromkeys(("PythonLoop", "CalledTwice", "UNet", "SqueezeExcite", "prelu", "group_norm"), (image,)),
        **dict.fromkeys(("TiedDecoder", "lstm", "gru"), (tokens,)),
        "Audio": (Input((2, 1, 400)),),
        "Volume": (Input((2, 1, 8, 16, 16)),),
        "Gated": (Input((4, 16)),),
        "Attentive": (tokens, Input((2, 9), below=50)),
        "faster_rcnn_backbone": (Input((1, 3, 224, 224)),),
        **{"hugging_face_vit": (image,), "hugging_face_bert": (tokens,)},
    }
    needs: dict[str, str] = dict.fromkeys(("hugging_face_vit", "hugging_face_bert"), "transformers")
    return [Entry(name, f"gmn.suite_networks:{name}", read, needs=needs.get(name, "")) for name, read in own.items()]


SUITES: dict[str, Callable[[], list[Entry]]] = {
    "torchvision": _torchvision,
    "torchvision-video": _torchvision_video,
    "timm": _timm,
    "extra": _extra,
}


TIMM_OPTIONS: dict[str, dict[str, Any]] = {"gemma4_vit_167m": {"depth": 14}, "deepseek_vit_412m": {"depth": 11}}
"""Families without a network under the limit: the smallest one, with as many of its equal layers as fit."""

TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""The smallest network of every family (`timm.list_modules()`): fewest parameters, then smallest input."""
