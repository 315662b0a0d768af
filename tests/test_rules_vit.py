"""Contract of the layout `vit` (GMN, appendix G.1): the graph of a vision transformer.

* Nodes: the image's channels, the stream after the patch embedding, and of every block the head channels, the stream
  after attention, the hidden neurons, the stream after them; the classes.
* Edges: patches; one per pair of stream and head channel, with three numbers (query, key, value); projections; both
  layers of the MLP; the identities of both residuals; the classifier.
* Norms lie on the stream that they read. Class token and position embedding are carried.
"""

from __future__ import annotations

import timm
import torch
import torchvision.models as tv
from reading import blocks, check, column, scrambled, sizes
from torch import nn

from gmn.convert import to_graph
from gmn.graph import GraphSpec

COLUMNS = ("norm.weight", "norm.bias", "bias", "q.bias", "k.bias", "v.bias")


def expected(width: int, depth: int, hidden: int, classes: int) -> tuple[int, int]:
    """Nodes and edges of a vision transformer on images of three channels."""
    nodes = 3 + width + depth * (3 * width + hidden) + classes
    edges = 3 * width + depth * (2 * width * width + 2 * width * hidden + 2 * width) + width * classes
    return nodes, edges


def counted(spec: GraphSpec) -> tuple[int, int]:
    return spec.num_nodes, spec.num_edges


def test_vit_b_16_has_the_size_of_the_paper() -> None:
    assert expected(768, 12, 3072, 1000) == (66_283, 71_567_616)
    model = tv.vit_b_16().eval()
    graph = to_graph(model, torch.zeros(1, 3, 224, 224), layout="vit")
    assert counted(graph.spec) == (66_283, 71_567_616)
    assert graph.spec.edge_kinds == {"16x16": 256, "3": 3, "1": 1}
    assert graph.spec.columns == COLUMNS
    assert set(graph.spec.carried) == {"class_token", "encoder.pos_embedding"}
    block = model.encoder.layers[5]
    index = [b.name for b in graph.spec.blocks].index("encoder.layers.encoder_layer_5.self_attention.in_proj_weight")
    packed = block.self_attention.in_proj_weight.view(3, 768, 768)
    assert torch.equal(graph.edge_features[index][0].permute(2, 0, 1), packed)


def tiny(classes: int = 7) -> nn.Module:
    return tv.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=classes
    )


def test_a_small_vit_of_torchvision() -> None:
    model = scrambled(tiny())
    graph = check(model, torch.randn(2, 3, 16, 16), layout="vit", carried=("class_token", "encoder.pos_embedding"))
    assert counted(graph.spec) == expected(12, 2, 20, 7)
    assert graph.spec.edge_kinds == {"8x8": 64, "3": 3, "1": 1}
    assert sorted(sizes(graph).values()) == sorted([3, 12, *[12, 12, 20, 12] * 2, 7])
    assert [heads for _, heads in graph.spec.heads] == [2, 2]
    layer = model.encoder.layers[0]
    stream, after = "conv_proj", "encoder.layers.encoder_layer_0.self_attention#2"
    assert torch.equal(column(graph, stream, "norm.weight"), layer.ln_1.weight)
    assert torch.equal(column(graph, stream, "bias"), model.conv_proj.bias)
    assert torch.equal(column(graph, after, "norm.bias"), layer.ln_2.bias)
    assert torch.equal(column(graph, after, "bias"), layer.self_attention.out_proj.bias)
    assert torch.equal(column(graph, "encoder.layers.encoder_layer_1.mlp.3", "norm.weight"), model.encoder.ln.weight)


def test_the_blocks_of_a_small_vit_in_order() -> None:
    graph = to_graph(scrambled(tiny()), torch.randn(2, 3, 16, 16), layout="vit")
    name = "encoder.layers.encoder_layer_0"
    heads, after, hidden, last = (f"{name}.{part}" for part in ("self_attention", "self_attention#2", "mlp.0", "mlp.3"))
    assert blocks(graph)[:7] == [
        ("conv_proj.weight", "input", "conv_proj", (1, 12, 3, 64)),
        (f"{name}.self_attention.in_proj_weight", "conv_proj", heads, (1, 12, 12, 3)),
        (f"{name}.self_attention.out_proj.weight", heads, after, (1, 12, 12, 1)),
        (f"{name}.residual", "conv_proj", after, (12, 1, 1, 1)),
        (f"{name}.mlp.0.weight", after, hidden, (1, 20, 12, 1)),
        (f"{name}.mlp.3.weight", hidden, last, (1, 12, 20, 1)),
        (f"{name}.residual", after, last, (12, 1, 1, 1)),
    ]


def test_a_small_vit_of_timm() -> None:
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=3, mlp_ratio=2.0, num_classes=5
    )
    graph = check(scrambled(model), torch.randn(2, 3, 16, 16), layout="vit", carried=("cls_token", "pos_embed"))
    assert counted(graph.spec) == expected(12, 3, 24, 5)
    assert graph.spec.edge_kinds == {"4x4": 16, "3": 3, "1": 1}
    assert [heads for _, heads in graph.spec.heads] == [3, 3, 3]
    attention = model.blocks[2].attn
    assert torch.equal(column(graph, "blocks.2.attn.qkv", "k.bias"), attention.qkv.bias.view(3, 12)[1])


def test_both_libraries_have_one_graph() -> None:
    one = to_graph(tiny(), torch.randn(2, 3, 16, 16), layout="vit")
    other = to_graph(
        timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, mlp_ratio=20 / 12, num_classes=7
        ),
        torch.randn(2, 3, 16, 16),
        layout="vit",
    )
    shapes = [[(b.src, b.dst, b.shape) for b in graph.spec.blocks] for graph in (one, other)]
    assert shapes[0] == shapes[1]
    assert one.spec.heads == other.spec.heads
