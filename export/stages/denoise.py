"""`condition` and `denoise`: everything of the head that does not depend on x, and one step of what does.

c(t) = time + condition is known for all steps before the first one, so all adaLN modulations of a query are computed
at once in `condition`: the adaLN weights, a third of the head, are read once instead of ten times.
"""

import numpy as np
import torch
from onnx import TensorProto

from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.scaledp import timestep_features
from chatvla_edge.export.spec import HeadSpec, PolicySpec
from chatvla_edge.export.stages.graph import Array, Graph
from chatvla_edge.export.stages.weights import Parameters, linear

FLOAT = TensorProto.FLOAT


def modulation_width(head: HeadSpec) -> int:
    """Numbers that modulate one step: six vectors per block and two of the final layer."""
    return (6 * head.depth + 2) * head.width


def condition(spec: PolicySpec, parameters: Parameters) -> Graph:
    """prompt_mean [1, D], reasoning_mean [1, D], state [1, S] normalised -> modulations [steps, M].

    Row i belongs to the i-th inference step, noisiest first; inside a row: the blocks in order (shift, scale, gate of
    the attention, then of the MLP), then shift and scale of the final layer.
    """
    head = spec.head
    assert head is not None
    graph = Graph("condition")
    hidden = head.cond_dim
    prompt = graph.input("prompt_mean", FLOAT, (1, hidden))
    reasoning = graph.input("reasoning_mean", FLOAT, (1, hidden))
    state = graph.input("state", FLOAT, (1, head.state_dim))

    def project(x: str, name: str) -> str:
        inner = graph.op("Gelu", linear(graph, parameters, x, f"fusion.{name}.0", hidden, hidden))
        return linear(graph, parameters, inner, f"fusion.{name}.2", hidden, hidden)

    observed, reasoned = project(prompt, "input_projector"), project(reasoning, "reasoning_projector")
    if spec.fusion.kind == "film":
        scale = linear(graph, parameters, reasoned, "fusion.film.scale", hidden, hidden)
        shift = linear(graph, parameters, reasoned, "fusion.film.shift", hidden, hidden)
        grown = graph.op("Mul", observed, graph.op("Add", scale, graph.constant(1.0, np.float32)))
        observation = graph.op("Add", graph.op("Add", grown, shift), prompt)
    else:
        observation = graph.op("Add", observed, reasoned)

    time = parameters.derived(
        graph, "head.time", (spec.sampler.steps, head.width), lambda: _time_embedding(spec, parameters)
    )
    conditions = [_condition(graph, parameters, head, observation, state, "cond_obs_emb")]
    if head.reasoning is not None:
        conditions.append(_condition(graph, parameters, head, reasoned, state, "cond_reasoning_emb"))
    driven = []
    for vector in conditions:
        summed = graph.op("Add", time, vector)
        driven.append(graph.op("Mul", summed, graph.op("Sigmoid", summed)))

    def modulate(name: str, follows: bool, parts: int) -> str:
        return linear(graph, parameters, driven[-1 if follows else 0], name, parts * head.width, head.width)

    which = head.reasoning
    rows = [
        modulate(f"head.blocks.{index}.adaLN_modulation.1", which is not None and which.start <= index < which.stop, 6)
        for index in range(head.depth)
    ]
    rows.append(modulate("head.final_layer.adaLN_modulation.1", which is not None and which.final, 2))
    graph.output(graph.op("Concat", *rows, axis=1), "modulations", FLOAT, (spec.sampler.steps, modulation_width(head)))
    return graph


def _condition(graph: Graph, parameters: Parameters, head: HeadSpec, vector: str, state: str, name: str) -> str:
    joined = head.cond_dim + head.state_dim
    if head.conditioning == "combine":
        x = graph.op("Concat", vector, state, axis=1)
        for layer, (rows, columns) in enumerate(
            [
                (head.combine_width, joined),
                (head.combine_width, head.combine_width),
                (head.cond_dim, head.combine_width),
            ]
        ):
            x = linear(graph, parameters, x, f"head.combine.{2 * layer}", rows, columns)
            x = graph.op("Relu", x) if layer < 2 else x
        return linear(graph, parameters, x, f"head.{name}", head.width, head.cond_dim)
    norm = graph.op(
        "LayerNormalization",
        vector,
        parameters.plain(graph, "head.norm_after_pool.weight", (head.cond_dim,)),
        parameters.plain(graph, "head.norm_after_pool.bias", (head.cond_dim,)),
        axis=-1,
        epsilon=1e-5,
    )
    return linear(graph, parameters, graph.op("Concat", norm, state, axis=1), f"head.{name}", head.width, joined)


def _time_embedding(spec: PolicySpec, parameters: Parameters) -> Array:
    """The time-step embedding of each inference step: it depends on nothing but weights."""
    timesteps = torch.tensor([step.timestep for step in ddim.steps(spec.sampler)])
    features = timestep_features(timesteps).float().numpy()
    weights = [parameters.array(f"head.t_embedder.mlp.{i}.{part}") for i in (0, 2) for part in ("weight", "bias")]
    first = features @ weights[0].T + weights[1]
    return np.asarray((first / (1 + np.exp(-first))) @ weights[2].T + weights[3], np.float32)


def denoise(spec: PolicySpec, parameters: Parameters) -> Graph:
    """x [H, A], modulation [1, M], coefficients [4], prefix [H, A], mask [H] -> x of the next step [H, A].

    coefficients: `ddim.Step.coefficients`; prefix and mask: committed actions, zeros when unused.
    """
    head = spec.head
    assert head is not None
    graph = Graph("denoise")
    x = graph.input("x", FLOAT, (head.horizon, head.action_dim))
    modulation = graph.input("modulation", FLOAT, (1, modulation_width(head)))
    coefficients = graph.input("coefficients", FLOAT, (4,))
    prefix = graph.input("prefix", FLOAT, (head.horizon, head.action_dim))
    mask = graph.input("mask", FLOAT, (head.horizon,))
    sizes = graph.constant([head.width] * (6 * head.depth + 2), np.int64)
    parts = graph.op_many("Split", modulation, sizes, outputs=6 * head.depth + 2, axis=1)
    one = graph.constant(1.0, np.float32)
    ones = graph.constant(np.ones(head.width, np.float32))

    def modulated(values: str, shift: str, scale: str) -> str:
        normal = graph.op("LayerNormalization", values, ones, axis=-1, epsilon=1e-6)
        return graph.op("Add", graph.op("Mul", normal, graph.op("Add", scale, one)), shift)

    h = linear(graph, parameters, x, "head.x_embedder", head.width, head.action_dim)
    h = graph.op(
        "Add",
        h,
        parameters.derived(
            graph, "head.pos_embed", (head.horizon, head.width), lambda: parameters.array("head.pos_embed")[0]
        ),
    )
    for index in range(head.depth):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts[6 * index : 6 * index + 6]
        attended = _attention(graph, parameters, head, modulated(h, shift_a, scale_a), f"head.blocks.{index}.attn")
        h = graph.op("Add", h, graph.op("Mul", gate_a, attended))
        name = f"head.blocks.{index}.mlp"
        inner = linear(graph, parameters, modulated(h, shift_m, scale_m), f"{name}.fc1", head.mlp_width, head.width)
        inner = linear(
            graph, parameters, graph.op("Gelu", inner, approximate="tanh"), f"{name}.fc2", head.width, head.mlp_width
        )
        h = graph.op("Add", h, graph.op("Mul", gate_m, inner))
    epsilon = linear(
        graph, parameters, modulated(h, parts[-2], parts[-1]), "head.final_layer.linear", head.action_dim, head.width
    )
    graph.output(_step(graph, x, epsilon, coefficients, prefix, mask), "x_next", FLOAT, (head.horizon, head.action_dim))
    return graph


def _attention(graph: Graph, parameters: Parameters, head: HeadSpec, x: str, name: str) -> str:
    size = head.width // head.heads
    qkv = linear(graph, parameters, x, f"{name}.qkv", 3 * head.width, head.width)
    shape = graph.constant([head.horizon, 3, head.heads, size], np.int64)
    turned = graph.op("Transpose", graph.op("Reshape", qkv, shape), perm=[1, 2, 0, 3])
    q, k, v = (graph.op("Gather", turned, graph.constant(i, np.int64), axis=0) for i in range(3))
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 2, 1]))
    scores = graph.op("Mul", scores, graph.constant(size**-0.5, np.float32))
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v)
    merged = graph.op(
        "Reshape", graph.op("Transpose", mixed, perm=[1, 0, 2]), graph.constant([head.horizon, -1], np.int64)
    )
    return linear(graph, parameters, merged, f"{name}.proj", head.width, head.width)


def _step(graph: Graph, x: str, epsilon: str, coefficients: str, prefix: str, mask: str) -> str:
    """`ddim.step`, in its order of operations."""
    signal, noise, next_signal, next_noise = (
        graph.op("Gather", coefficients, graph.constant(i, np.int64), axis=0) for i in range(4)
    )
    clean = graph.op("Div", graph.op("Sub", x, graph.op("Mul", noise, epsilon)), signal)
    clean = graph.op("Clip", clean, graph.constant(-1.0, np.float32), graph.constant(1.0, np.float32))
    free = graph.op("Add", graph.op("Mul", next_signal, clean), graph.op("Mul", next_noise, epsilon))
    started = graph.op("Div", graph.op("Sub", x, graph.op("Mul", signal, prefix)), noise)
    held = graph.op("Add", graph.op("Mul", next_signal, prefix), graph.op("Mul", next_noise, started))
    column = graph.op("Unsqueeze", mask, graph.constant([1], np.int64))
    rest = graph.op("Sub", graph.constant(1.0, np.float32), column)
    return graph.op("Add", graph.op("Mul", rest, free), graph.op("Mul", column, held))
