"""Bodies, in standard operators, of the nodes of our own domain. A body is the specification of its node.

Each body is specialised for the sizes of one model (no optional inputs: an omitted one makes an invalid graph), and a
name carries what distinguishes two specialisations in one file.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from chatvla_edge.export.spec import LanguageSpec
from chatvla_edge.export.stages.graph import DOMAIN, OPSET


class Body:
    """A function body under construction; every value is a string."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, kind: str, *inputs: str, to: str | None = None, **attributes: object) -> str:
        """Append a node; `to` names its output."""
        name = to or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(self, value: object, dtype: type[np.generic] = np.int64) -> str:
        """A constant inside the body."""
        name = f"v{len(self.nodes)}"
        tensor = numpy_helper.from_array(np.asarray(value, dtype=dtype), name)
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def function(self, name: str, inputs: list[str], outputs: list[str], doc: str) -> onnx.FunctionProto:
        """Close the body."""
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_function(DOMAIN, name, inputs, outputs, self.nodes, opsets, doc_string=doc)


def top_k_moe(language: LanguageSpec) -> onnx.FunctionProto:
    """TopKMoE(x [T, H], logits [T, E] fp32, gate_up [E, 2I, H], down [E, H, I]) -> y [T, H].

    weights = softmax over the top-k logits; y = sum over the kept experts of weight * down(silu(gate) * up).
    gate_up holds the gate rows, then the up rows, of each expert. Experts add up in ascending order.
    """
    experts, width = language.experts, language.routed_width
    body = Body()
    k = body.const([experts.top_k])
    body.nodes.append(helper.make_node("TopK", ["logits", k], ["kept", "ids"], axis=-1))
    if experts.renormalize:
        body.op("Softmax", "kept", axis=-1, to="weights")
    else:
        body.op("GatherElements", body.op("Softmax", "logits", axis=-1), "ids", axis=1, to="weights")
    halves = body.const([width, width])
    total = body.op("Mul", "x", body.const(0.0, np.float32))
    for index in range(experts.routed):
        # Rows that chose this expert, and the weight each gave it; a row lists an expert at most once.
        chosen = body.op("Equal", "ids", body.const(index))
        where = body.op("NonZero", chosen)
        rows = body.op("Gather", where, body.const(0), axis=0)
        places = body.op("Transpose", where, perm=[1, 0])
        share = body.op("Unsqueeze", body.op("GatherND", "weights", places), body.const([1]))
        picked = body.op("Gather", "x", rows, axis=0)
        number = body.const(index)
        hidden = body.op(
            "MatMul", picked, body.op("Transpose", body.op("Gather", "gate_up", number, axis=0), perm=[1, 0])
        )
        gate, up = f"gate{index}", f"up{index}"
        body.nodes.append(helper.make_node("Split", [hidden, halves], [gate, up], axis=1))
        inner = body.op("Mul", body.op("Mul", gate, body.op("Sigmoid", gate)), up)
        out = body.op("MatMul", inner, body.op("Transpose", body.op("Gather", "down", number, axis=0), perm=[1, 0]))
        total = body.op(
            "ScatterND",
            total,
            body.op("Unsqueeze", rows, body.const([1])),
            body.op("Mul", out, share),
            reduction="add",
        )
    body.op("Identity", total, to="y")
    return body.function(
        "TopKMoE", ["x", "logits", "gate_up", "down"], ["y"], "Routed SwiGLU experts; see the project's design, 4.3."
    )


def mrope(name: str, heads: int, language: LanguageSpec) -> onnx.FunctionProto:
    """MRope(x [T, heads * d], positions [3, T] int64) -> [T, heads * d], rotated by three-axis rotary positions.

    Section s of the frequencies turns by axis s (time, height, width); halves are paired as (i, i + d / 2).
    """
    size, half = language.head_dim, language.head_dim // 2
    body = Body()
    frequencies = (1.0 / language.rope_theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))).astype(
        np.float32
    )
    angles = body.op(
        "Mul",
        body.op("Unsqueeze", _cast(body, "positions"), body.const([2])),
        body.const(frequencies[None, None], np.float32),
    )
    names = ["section0", "section1", "section2"]
    body.nodes.append(helper.make_node("Split", [angles, body.const(list(language.mrope_section))], names, axis=2))
    picked = [body.op("Gather", part, body.const(axis), axis=0) for axis, part in enumerate(names)]
    turned = body.op("Unsqueeze", body.op("Concat", *picked, axis=1), body.const([1]))  # [T, 1, d / 2]
    cos, sin = body.op("Cos", turned), body.op("Sin", turned)
    parts = body.op("Reshape", "x", body.const([0, heads, size]))
    body.nodes.append(helper.make_node("Split", [parts, body.const([half, half])], ["low", "high"], axis=2))
    low = body.op("Sub", body.op("Mul", "low", cos), body.op("Mul", "high", sin))
    high = body.op("Add", body.op("Mul", "high", cos), body.op("Mul", "low", sin))
    body.op("Reshape", body.op("Concat", low, high, axis=2), body.const([0, heads * size]), to="y")
    return body.function(name, ["x", "positions"], ["y"], "Rotary positions on three axes.")


def _cast(body: Body, value: str) -> str:
    name = f"v{len(body.nodes)}"
    body.nodes.append(helper.make_node("Cast", [value], [name], to=onnx.TensorProto.FLOAT))
    return name


def cached_attention(language: LanguageSpec) -> onnx.FunctionProto:
    """CachedAttention(q [T, h*d], k, v [T, g*d], past_k, past_v [1, g, C, d], length [1]) -> y, present_k, present_v.

    Rows `length` .. `length + T - 1` of the cache become k and v; row i attends to cache rows 0 .. length + i. What
    lies behind stays as it was. Scores and softmax in fp32.
    """
    heads, groups, size = language.heads, language.kv_heads, language.head_dim
    body = Body()
    count = body.op("Gather", body.op("Shape", "q"), body.const([0]), axis=0)
    zero, one = body.const(0), body.const(1)
    steps = body.op("Range", zero, body.op("Squeeze", count), one)
    rows = body.op("Add", steps, "length")  # [T]
    capacity = body.op("Squeeze", body.op("Gather", body.op("Shape", "past_k"), body.const([2]), axis=0))

    def store(new: str, past: str, to: str) -> str:
        # ScatterND works on leading axes: bring the cache rows to the front and back.
        front = body.op("Transpose", past, perm=[2, 0, 1, 3])
        shaped = body.op("Reshape", new, body.const([0, 1, groups, size]))
        written = body.op("ScatterND", front, body.op("Unsqueeze", rows, body.const([1])), shaped)
        return body.op("Transpose", written, perm=[1, 2, 0, 3], to=to)

    keys, values = store("k", "past_k", "present_k"), store("v", "past_v", "present_v")
    # [g, h/g, T, d] against [g, 1, C, d]
    query = body.op("Reshape", "q", body.const([0, groups, heads // groups, size]))
    query = body.op("Transpose", query, perm=[1, 2, 0, 3])
    keys = body.op("Transpose", keys, perm=[1, 0, 3, 2])
    values = body.op("Transpose", values, perm=[1, 0, 2, 3])
    scores = body.op("Mul", body.op("MatMul", query, keys), body.const(size**-0.5, np.float32))
    seen = body.op(
        "LessOrEqual",
        body.op("Unsqueeze", body.op("Range", zero, capacity, one), body.const([0])),
        body.op("Unsqueeze", rows, body.const([1])),
    )
    masked = body.op("Where", seen, scores, body.const(np.finfo(np.float32).min, np.float32))
    mixed = body.op("MatMul", body.op("Softmax", masked, axis=-1), values)
    merged = body.op("Transpose", mixed, perm=[2, 0, 1, 3])
    body.op("Reshape", merged, body.const([0, heads * size]), to="y")
    return body.function(
        "CachedAttention",
        ["q", "k", "v", "past_k", "past_v", "length"],
        ["y", "present_k", "present_v"],
        "Causal attention over a cache of fixed capacity.",
    )
