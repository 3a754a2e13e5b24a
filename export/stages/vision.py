"""`vision`: patches of one camera grid -> image tokens; frames of several cameras with that grid in one batch.

Both temporal slices of a patch are the same frame, so the patch convolution folds to one linear map over 588 values:
the sum of its two temporal halves.
"""

import numpy as np
from onnx import TensorProto

from chatvla_edge.export.spec import PolicySpec
from chatvla_edge.export.stages.graph import Array, Graph
from chatvla_edge.export.stages.weights import Parameters, linear

FLOAT = TensorProto.FLOAT


def vision(spec: PolicySpec, parameters: Parameters, grid: tuple[int, int]) -> Graph:
    """patches [N, P, 588] -> image_tokens [N, P / 4, D] for grids of `grid` = (rows, columns) patches."""
    model, hidden = spec.vision, spec.language.hidden
    count, width = grid[0] * grid[1], model.embed_dim
    merged = count // model.merge**2
    folded = model.channels * model.patch**2
    graph = Graph(f"vision_{grid[0]}x{grid[1]}")
    patches = graph.input("patches", FLOAT, ("N", count, folded))
    flat = graph.constant([-1, folded], np.int64)
    x = graph.op("Reshape", patches, flat)
    embed = parameters.derived(graph, "visual.patch_embed.folded", (width, folded), lambda: _folded(spec, parameters))
    x = graph.op("Gemm", x, embed, transB=1)
    cos, sin = _rotary(spec, grid)
    angles = [graph.constant(table[None, :, None, :], np.float32) for table in (cos, sin)]
    for i in range(model.depth):
        name = f"backbone.visual.blocks.{i}"
        normal = _norm(graph, parameters, x, f"{name}.norm1", width)
        x = graph.op("Add", x, _attention(graph, parameters, spec, normal, angles, count, f"{name}.attn"))
        normal = _norm(graph, parameters, x, f"{name}.norm2", width)
        wide = model.mlp_ratio * width
        inner = linear(graph, parameters, normal, f"{name}.mlp.fc1", wide, width)
        gate = graph.op("Sigmoid", graph.op("Mul", inner, graph.constant(1.702, np.float32)))
        x = graph.op("Add", x, linear(graph, parameters, graph.op("Mul", inner, gate), f"{name}.mlp.fc2", width, wide))
    x = _norm(graph, parameters, x, "backbone.visual.merger.ln_q", width)
    group = model.merge**2 * width
    x = graph.op("Reshape", x, graph.constant([-1, group], np.int64))
    x = graph.op("Gelu", linear(graph, parameters, x, "backbone.visual.merger.mlp.0", group, group))
    x = linear(graph, parameters, x, "backbone.visual.merger.mlp.2", hidden, group)
    tokens = graph.op("Reshape", x, graph.constant([-1, merged, hidden], np.int64))
    graph.output(tokens, "image_tokens", FLOAT, ("N", merged, hidden))
    return graph


def _folded(spec: PolicySpec, parameters: Parameters) -> Array:
    """[width, C, 2, 14, 14] -> [width, C * 14 * 14]: the two temporal halves see the same pixels."""
    weight = parameters.array("backbone.visual.patch_embed.proj.weight")
    return np.asarray(weight.sum(axis=2).reshape(spec.vision.embed_dim, -1), np.float32)


def _norm(graph: Graph, parameters: Parameters, x: str, name: str, width: int) -> str:
    weight = parameters.plain(graph, f"{name}.weight", (width,))
    bias = parameters.plain(graph, f"{name}.bias", (width,))
    return graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=1e-6)


def _attention(
    graph: Graph, parameters: Parameters, spec: PolicySpec, x: str, angles: list[str], count: int, name: str
) -> str:
    model = spec.vision
    width, heads, size = model.embed_dim, model.heads, model.embed_dim // model.heads
    qkv = linear(graph, parameters, x, f"{name}.qkv", 3 * width, width)
    split = graph.op("Reshape", qkv, graph.constant([-1, count, 3, heads, size], np.int64))
    q, k, v = (graph.op("Gather", split, graph.constant(i, np.int64), axis=2) for i in range(3))  # [N, P, h, d]
    q, k = (_turn(graph, value, angles, size) for value in (q, k))
    q, v = (graph.op("Transpose", value, perm=[0, 2, 1, 3]) for value in (q, v))
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 3, 1]))
    scores = graph.op("Mul", scores, graph.constant(size**-0.5, np.float32))
    mixed = graph.op("Transpose", graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    merged = graph.op("Reshape", mixed, graph.constant([-1, width], np.int64))
    return linear(graph, parameters, merged, f"{name}.proj", width, width)


def _turn(graph: Graph, x: str, angles: list[str], size: int) -> str:
    halves = graph.constant([size // 2, size // 2], np.int64)
    low, high = graph.op_many("Split", x, halves, outputs=2, axis=3)
    cos, sin = angles
    turned_low = graph.op("Sub", graph.op("Mul", low, cos), graph.op("Mul", high, sin))
    turned_high = graph.op("Add", graph.op("Mul", high, cos), graph.op("Mul", low, sin))
    return graph.op("Concat", turned_low, turned_high, axis=3)


def _rotary(spec: PolicySpec, grid: tuple[int, int]) -> tuple[Array, Array]:
    """cos and sin [P, d / 2] of a grid, patches in merge-group order; the first half turns by row, then by column."""
    merge, size = spec.vision.merge, spec.vision.embed_dim // spec.vision.heads
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")

    def grouped(values: Array) -> Array:
        cut = values.reshape(grid[0] // merge, merge, grid[1] // merge, merge)
        flat: Array = cut.transpose(0, 2, 1, 3).reshape(-1)
        return flat

    quarter = size // 2
    steps = np.arange(0, quarter, 2, dtype=np.float32) / np.float32(quarter)
    frequencies = (np.float32(1.0) / np.float32(10_000.0) ** steps).astype(np.float32)
    angles = np.concatenate([np.outer(grouped(values), frequencies) for values in (rows, columns)], axis=1)
    return np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
