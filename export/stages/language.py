"""`language`: one graph for prefill, chunked prefill, verification and decode, over a cache of fixed capacity.

Inputs, T rows of this pass:
  token_ids [T] int64; image_tokens [I, D] and image_rows [I] int64: the rows that are image tokens, I may be 0;
  positions [3, T] int64; length [1] int64: rows already in the cache;
  first_row [1] int64: outputs are for rows first_row .. T-1; sum_stop [1] int64: rows 0 .. sum_stop-1 are summed;
  past_key_i, past_value_i [1, g, C, d] for every layer.
Outputs, n = T - first_row:
  token [n] int64, top2_logits [n, 2], hidden [n, D] (after the final norm), hidden_sum [D], routing_i [T, k] of every
  routed layer, present_key_i, present_value_i.

Logits never leave the engine. Expert ids leave it because an operator wants to see routing, and they are small.
"""

import numpy as np
from onnx import TensorProto

from chatvla_edge.export.spec import PolicySpec
from chatvla_edge.export.stages import functions
from chatvla_edge.export.stages.graph import DOMAIN, Graph
from chatvla_edge.export.stages.weights import Parameters, linear

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
EMBEDDING = "backbone.language.embed_tokens.weight"


def language(spec: PolicySpec, parameters: Parameters) -> Graph:
    """Lay out the language stage."""
    model = spec.language
    graph = Graph("language")
    ids = graph.input("token_ids", INT64, ("T",))
    image_tokens = graph.input("image_tokens", FLOAT, ("I", model.hidden))
    image_rows = graph.input("image_rows", INT64, ("I",))
    positions = graph.input("positions", INT64, (3, "T"))
    length = graph.input("length", INT64, (1,))
    first_row = graph.input("first_row", INT64, (1,))
    sum_stop = graph.input("sum_stop", INT64, (1,))
    cache = (1, model.kv_heads, "C", model.head_dim)
    past = [[graph.input(f"past_{kind}_{i}", FLOAT, cache) for kind in ("key", "value")] for i in range(model.layers)]
    graph.function(functions.mrope("MRopeQuery", model.heads, model))
    graph.function(functions.mrope("MRopeKey", model.kv_heads, model))
    graph.function(functions.cached_attention(model))
    if model.experts.routed:
        graph.function(functions.top_k_moe(model))

    embedding = parameters.table(graph, EMBEDDING, (model.vocab, model.hidden))
    words = graph.op("Gather", embedding, ids, axis=0)
    column = graph.constant([1], np.int64)
    h = graph.op("ScatterND", words, graph.op("Unsqueeze", image_rows, column), image_tokens)
    routing = []
    for i in range(model.layers):
        name = f"backbone.language.layers.{i}"
        normal = rms_norm(graph, parameters, h, f"{name}.input_layernorm.weight", spec)
        attended, present = _attention(graph, parameters, spec, normal, positions, length, past[i], f"{name}.self_attn")
        for kind, value in zip(("key", "value"), present, strict=True):
            graph.output(value, f"present_{kind}_{i}", FLOAT, cache)
        h = graph.op("Add", h, attended)
        normal = rms_norm(graph, parameters, h, f"{name}.post_attention_layernorm.weight", spec)
        mixed, chosen = _mlp(graph, parameters, spec, normal, f"{name}.mlp")
        h = graph.op("Add", h, mixed)
        if chosen is not None:
            routing.append((i, chosen))
    final = rms_norm(graph, parameters, h, "backbone.language.norm.weight", spec)

    axis = graph.constant([0], np.int64)
    everything = graph.constant([np.iinfo(np.int64).max], np.int64)
    rows = graph.op("Slice", final, first_row, everything, axis)
    output = (
        embedding if model.tied else parameters.plain(graph, "backbone.lm_head.weight", (model.vocab, model.hidden))
    )
    logits = graph.op("Gemm", rows, output, transB=1)
    top, tokens = graph.op_many("TopK", logits, graph.constant([2], np.int64), outputs=2, axis=-1)
    token = graph.op("Gather", tokens, graph.constant(0, np.int64), axis=1)
    summed = graph.op("ReduceSum", graph.op("Slice", final, axis, sum_stop, axis), axis, keepdims=0)
    graph.output(token, "token", INT64, ("n",))
    graph.output(top, "top2_logits", FLOAT, ("n", 2))
    graph.output(rows, "hidden", FLOAT, ("n", model.hidden))
    graph.output(summed, "hidden_sum", FLOAT, (model.hidden,))
    for i, chosen in routing:
        graph.output(chosen, f"routing_{i}", INT64, ("T", model.experts.top_k))
    return graph


def rms_norm(graph: Graph, parameters: Parameters, x: str, weight: str, spec: PolicySpec) -> str:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32."""
    squares = graph.op("Mul", x, x)
    mean = graph.op("ReduceMean", squares, graph.constant([-1], np.int64), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(spec.language.rms_eps, np.float32)))
    return graph.op("Mul", graph.op("Div", x, root), parameters.plain(graph, weight, (spec.language.hidden,)))


def _attention(
    graph: Graph,
    parameters: Parameters,
    spec: PolicySpec,
    x: str,
    positions: str,
    length: str,
    past: list[str],
    name: str,
) -> tuple[str, list[str]]:
    model = spec.language
    wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
    q = linear(graph, parameters, x, f"{name}.q_proj", wide, model.hidden)
    k = linear(graph, parameters, x, f"{name}.k_proj", narrow, model.hidden)
    v = linear(graph, parameters, x, f"{name}.v_proj", narrow, model.hidden)
    q = graph.op("MRopeQuery", q, positions, domain=DOMAIN)
    k = graph.op("MRopeKey", k, positions, domain=DOMAIN)
    y, *present = graph.op_many("CachedAttention", q, k, v, *past, length, outputs=3, domain=DOMAIN)
    return linear(graph, parameters, y, f"{name}.o_proj", model.hidden, wide, bias=False), present


def _swiglu(graph: Graph, parameters: Parameters, x: str, name: str, width: int, hidden: int) -> str:
    gate = linear(graph, parameters, x, f"{name}.gate_proj", width, hidden, bias=False)
    up = linear(graph, parameters, x, f"{name}.up_proj", width, hidden, bias=False)
    inner = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
    return linear(graph, parameters, inner, f"{name}.down_proj", hidden, width, bias=False)


def _mlp(graph: Graph, parameters: Parameters, spec: PolicySpec, x: str, name: str) -> tuple[str, str | None]:
    """What stands in place of the MLP, and the ids of the experts each row chose."""
    model, experts = spec.language, spec.language.experts
    if experts.kind == "dense":
        return _swiglu(graph, parameters, x, name, model.intermediate, model.hidden), None
    if experts.scoring == "sigmoid":
        raise ValueError(
            "sigmoid routing (the DeepSeek-style research variant) is not exported: found scoring = 'sigmoid', "
            "expected 'softmax'. Train with using_shared_routed_expert, the variant that the paper evaluates"
        )
    parts, chosen = [], None
    if experts.routed:
        routed, chosen = _routed(graph, parameters, spec, x, name)
        parts.append(routed)
    shared = [
        _swiglu(graph, parameters, x, f"{name}.shared.{j}", model.shared_width, model.hidden)
        for j in range(experts.shared)
    ]
    if shared:
        total = _sum(graph, shared)
        if experts.shared_gate:
            gate = graph.op("Sigmoid", linear(graph, parameters, x, f"{name}.shared_gate", 1, model.hidden, bias=False))
            total = graph.op("Mul", gate, total)
        parts.append(total)
    if experts.static:
        static = _swiglu(
            graph, parameters, x, f"{name}.static.{experts.static_active}", model.intermediate, model.hidden
        )
        if not parts:
            return static, chosen
        both = graph.op("Add", _sum(graph, parts), static)
        return graph.op("Mul", both, graph.constant(0.5, np.float32)), chosen
    return _sum(graph, parts), chosen


def _routed(graph: Graph, parameters: Parameters, spec: PolicySpec, x: str, name: str) -> tuple[str, str]:
    model, experts = spec.language, spec.language.experts
    width, count = model.routed_width, experts.routed
    logits = linear(graph, parameters, x, f"{name}.router", count, model.hidden, bias=experts.router_bias)
    gate_up = parameters.stacked(
        graph,
        f"{name}.gate_up",
        (count, 2 * width, model.hidden),
        [f"{name}.routed.{e}.{p}.weight" for e in range(count) for p in ("gate_proj", "up_proj")],
    )
    down = parameters.stacked(
        graph,
        f"{name}.down",
        (count, model.hidden, width),
        [f"{name}.routed.{e}.down_proj.weight" for e in range(count)],
    )
    y = graph.op("TopKMoE", x, logits, gate_up, down, domain=DOMAIN)
    _, chosen = graph.op_many("TopK", logits, graph.constant([experts.top_k], np.int64), outputs=2, axis=-1)
    return y, chosen


def _sum(graph: Graph, values: list[str]) -> str:
    total = values[0]
    for value in values[1:]:
        total = graph.op("Add", total, value)
    return total
