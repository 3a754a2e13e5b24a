"""The cpu target computes what the reference computes, with the weights it was given.

fp32 is compared with the reference itself. int8 and int4 are compared with a reference that holds the values of the
quantized weights: a difference there is a fault of the lowering, whatever quantization costs. MatMulNBits then runs at
accuracy level 0 (fp32 arithmetic), because at level 4, which the lowering asks for, it rounds activations to int8 as
well; what that costs has its own test. Where activations are rounded row by row, the reference rounds them too.
"""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support import stages, tiny

from chatvla_edge.export.lower.onnxruntime import Target, lower
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.quantize import PRECISIONS, dequantize, quantize
from chatvla_edge.export.spec import ExpertsSpec, PolicySpec, VisionSpec
from chatvla_edge.export.stages.denoise import condition, denoise
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.vision import vision

EXPERTS = {
    "dense": ExpertsSpec(),
    "static": ExpertsSpec(static=2, static_active=1),
    "dynamic 8/2": ExpertsSpec(routed=8, top_k=2),
    "dynamic 6/3": ExpertsSpec(routed=6, top_k=3, routed_width=72),
    "dynamic 4/2, no router bias": ExpertsSpec(routed=4, top_k=2, router_bias=False),
    "weights as they come": ExpertsSpec(routed=8, top_k=2, renormalize=False),
    "shared through a gate": ExpertsSpec(routed=4, top_k=2, shared=2, shared_width=80, shared_gate=True),
    "static + dynamic": ExpertsSpec(routed=6, top_k=3, static=2),
}
QUANTIZED = ["int8", "int8-row", "int4", "int4-row"]
# A value halfway between two codes may go either way, which moves one activation by one step: rarely, but what follows
# is moved too. Most rows agree to 1e-6; without rounding in the reference, all differ by about 1e-2.
TOLERANCE = {precision: 3e-3 if "row" in precision else 1e-5 for precision in PRECISIONS}
MEDIAN_ROW = 5e-3
PRODUCTS = {
    "fp32": set(),
    "int8": {"MatMulNBits"},
    "int8-row": {"MatMulIntegerToFloat"},
    "int4": {"MatMulNBits"},
    "int4-row": {"MatMulNBits", "MatMulIntegerToFloat"},
}


def with_experts(experts) -> PolicySpec:
    """Maps of more than one block, and of widths that are no multiple of a block."""
    head = tiny.head(width=64, cond_dim=192, mlp_width=160)
    return PolicySpec(
        vision=VisionSpec(depth=2, embed_dim=64, heads=2),
        language=tiny.language(experts, hidden=192, heads=12, kv_heads=4, layers=2, intermediate=136),
        head=head,
        tokens=tiny.TOKENS,
    )


def form_of(name: str, precision: str):
    forms = PRECISIONS[precision]
    return forms.experts if "language.layers" in name and ".mlp." in name else forms.maps


def rounded(name: str, weight: torch.Tensor, precision: str) -> torch.Tensor:
    form = form_of(name, precision)
    return torch.from_numpy(dequantize(quantize(weight.numpy(), form), form, weight.shape[1]))


def round_rows(_module, inputs):
    """Each row to multiples of its largest magnitude / 127."""
    (x,) = inputs
    step = x.abs().amax(-1, keepdim=True) / 127
    return (torch.where(step == 0, 0, (x / step).round() * step),)


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    """Every linear map of some size, except routers; norms, biases, tables and embeddings never."""
    apart = ("router", "embed_tokens", "pos_embed", "t_embedder", "patch_embed")
    return tensor.dim() == 2 and min(tensor.shape) >= 64 and not any(part in name for part in apart)


def with_rounded_weights(model: ChatVLA2, precision: str) -> ChatVLA2:
    """The reference with what the engine computes with; a tied embedding keeps fp32, its output head does not."""
    spec = model.spec.model_copy(update={"language": model.spec.language.model_copy(update={"tied": False})})
    state = {
        name: rounded(name, value, precision) if is_quantized(name, value) else value
        for name, value in model.state_dict().items()
    }
    patch = "backbone.visual.patch_embed.proj.weight"
    folded = rounded(patch, state[patch].sum(2).reshape(state[patch].shape[0], -1), precision)
    folded = folded.reshape(*state[patch].shape[:2], 1, *state[patch].shape[3:])
    state[patch] = (folded / 2).expand(state[patch].shape).contiguous()
    out = ChatVLA2(spec).eval().requires_grad_(False)
    out.load_state_dict(state)
    for name, module in out.named_modules():
        weight = f"{name}.weight"
        maps = isinstance(module, torch.nn.Linear) and is_quantized(weight, module.weight)
        if (maps or weight == patch) and not form_of(weight, precision).block:
            (module if maps else out.get_submodule(name.rpartition(".")[0])).register_forward_pre_hook(round_rows)
    return out


def rms(found, expected) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2.0)) / np.sqrt(np.mean(expected**2.0)))


def exact(path):
    """The same file with fp32 arithmetic behind quantized weights."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, str(path))
    return path


def nodes(path):
    return list(onnx.load(str(path), load_external_data=False).graph.node)


def kinds(path):
    return {node.op_type for node in nodes(path)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EXPERTS)
def test_the_language_stage_is_the_reference_with_these_weights(name, precision, tmp_path):
    spec = with_experts(EXPERTS[name])
    model = tiny.model(spec, scale=0.06)
    graph = stages.lowered(language(spec, stages.parameters(model)), spec, precision)
    path = exact(stages.save(graph, tmp_path))
    assert kinds(path) & {"MatMulNBits", "MatMulIntegerToFloat"} == PRODUCTS[precision]
    reference = stages.Reference(with_rounded_weights(model, precision) if precision in QUANTIZED else model)
    stage = stages.Stage(path, spec, in_place=True)
    prompt = stages.prompt(spec, 21, [(4, 8)])
    errors: list[float] = []
    for inputs in (prompt.rows(0, 12, sum_stop=12), prompt.rows(12, 20, first_row=2), prompt.rows(20, 21, sum_stop=1)):
        found, said = stage(inputs), reference(inputs)
        if "row" in precision:
            errors.extend(map(rms, found["hidden"], said["hidden"]))
        else:
            stages.assert_same_pass(found, said)
    expected = reference.rows()
    for cached, rows in stage.rows().items():
        if "row" not in precision:
            assert stages.relative(rows, expected[cached]) <= 1e-5
    assert np.median(errors or [0.0]) <= MEDIAN_ROW


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_other_stages_are_the_reference_with_these_weights(precision, tmp_path):
    spec = with_experts(tiny.DENSE)
    model = tiny.model(spec, scale=0.06)
    reference = with_rounded_weights(model, precision) if precision in QUANTIZED else model
    weights, head = stages.parameters(model), spec.head
    ignored = {"MatMulNBits"} if precision == "int4-row" else set()  # of the language stage alone

    def run(graph, **feed):
        path = exact(stages.save(stages.lowered(graph, spec, precision), tmp_path))
        assert kinds(path) & {"MatMulNBits", "MatMulIntegerToFloat"} == PRODUCTS[precision] - ignored
        (out,) = stages.session(path).run(None, feed)
        return out

    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(0, 1, shape).astype(np.float32)

    patches = draw(2, 24, 588)
    doubled = np.repeat(patches.reshape(48, 3, 1, 196), 2, axis=2).reshape(48, -1)
    expected = reference.backbone.images(torch.from_numpy(doubled), [stages.GRID] * 2).numpy()
    assert (
        stages.relative(run(vision(spec, weights, stages.GRID), patches=patches).reshape(expected.shape), expected)
        <= TOLERANCE[precision]
    )

    means, state = draw(2, 1, 192), draw(1, 14)
    found = run(condition(spec, weights), prompt_mean=means[0], reasoning_mean=means[1], state=state)
    conditions = reference.head.condition(*reference.fusion(*torch.from_numpy(means)), torch.from_numpy(state))
    x, at = torch.from_numpy(draw(head.horizon, 14)), stages.ddim.steps(spec.sampler)[3]
    epsilon = reference.head(x[None], torch.tensor([at.timestep]), conditions)[0]
    feed = {"x": x.numpy(), "modulation": found[3:4], "coefficients": np.array(at.coefficients, np.float32)}
    feed |= {"prefix": np.zeros_like(x), "mask": np.zeros(head.horizon, np.float32)}
    tolerance = TOLERANCE[precision]
    assert stages.relative(run(denoise(spec, weights), **feed), stages.ddim.step(x, epsilon, at).numpy()) <= tolerance


@pytest.mark.parametrize("precision", PRECISIONS)
def test_routers_and_small_maps_keep_their_fp32_weights(precision, tmp_path):
    spec = with_experts(EXPERTS["shared through a gate"])
    model = tiny.model(spec)
    weights = stages.parameters(model)
    for stage in (language, condition, denoise):
        graph = stages.lowered(stage(spec, weights), spec, precision)
        path = stages.save(graph, tmp_path)
        plain = {node.input[1] for node in nodes(path) if node.op_type == "Gemm"}
        products = [node.input[1] for node in nodes(path) if node.op_type in ("MatMulNBits", "MatMulIntegerToFloat")]
        packed = {name.removesuffix(".codes").removesuffix(".values") for name in products}
        if precision == "fp32":
            assert not packed
            continue
        assert all("router" in name or min(graph.weights[name].shape) < 64 for name in plain)
        assert not any("router" in name or "shared_gate" in name or "final_layer.linear" in name for name in packed)
        for name in plain:
            np.testing.assert_array_equal(graph.weights[name].array(), weights.array(name))


@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_router_over_many_experts_keeps_fp32_too(precision):
    """By rule, not because it happens to be small."""
    spec = with_experts(ExpertsSpec(routed=64, top_k=2, routed_width=72))
    graph = stages.lowered(language(spec, stages.parameters(tiny.model(spec))), spec, precision)
    for i in range(spec.language.layers):
        assert graph.weights[f"backbone.language.layers.{i}.mlp.router.weight"].dtype == np.float32
    assert not any("router" in name and name.endswith((".codes", ".scales")) for name in graph.weights)


@pytest.mark.parametrize("precision", ["int8-row", "int4-row"])
def test_rows_of_zeros_and_of_any_size_stay_numbers(precision, tmp_path):
    """A row's scale is its largest magnitude: of a row of zeros that is 0, and 0 / 0 must not come out of it."""
    spec = with_experts(tiny.DENSE)
    graph = stages.lowered(vision(spec, stages.parameters(tiny.model(spec)), stages.GRID), spec, precision)
    session = stages.session(stages.save(graph, tmp_path))
    patches = np.random.default_rng(0).normal(0, 1, (1, 24, 588)).astype(np.float32)
    patches[0, :20] *= np.logspace(-38, 30, 20, dtype=np.float32)[:, None]
    patches[0, 20:22] = 0
    (found,) = session.run(None, {"patches": patches})
    assert np.isfinite(found).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_lowered_file_needs_nothing_of_ours(stage, precision, tmp_path):
    spec = tiny.policy()
    weights = stages.parameters(tiny.model(spec))
    path = stages.save(stages.lowered(stages.STAGES[stage](spec, weights), spec, precision), tmp_path)
    model = onnx.load(str(path), load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    assert {entry.domain for entry in model.opset_import} <= {"", "com.microsoft"}
    # QMoE rows depend on each other; MRotaryEmbedding is missing from the ONNX Runtime of Python 3.10.
    # One scale for all rows of DynamicQuantizeMatMul.
    assert not kinds(path) & {
        "DynamicQuantizeMatMul",
        "QMoE",
        "MoE",
        "MRotaryEmbedding",
        "TopKMoE",
        "MRopeQuery",
        "CachedAttention",
    }
    onnx.checker.check_model(str(path), full_check=True)


def test_lowering_leaves_the_neutral_graph_as_it_was(tmp_path):
    spec = tiny.policy()
    graph = language(spec, stages.parameters(tiny.model(spec)))
    before = stages.save(graph, tmp_path, "before").read_bytes()
    stages.lowered(graph, spec, "int4")
    assert stages.save(graph, tmp_path, "before").read_bytes() == before


def test_every_initializer_of_a_lowered_file_is_used(tmp_path):
    spec = with_experts(EXPERTS["static + dynamic"])
    graph = stages.lowered(language(spec, stages.parameters(tiny.model(spec))), spec, "int8")
    model = onnx.load(str(stages.save(graph, tmp_path)), load_external_data=False)
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    assert not any(".static.1." in name for name in graph.weights), "the static expert that is not active"


@pytest.mark.parametrize("precision", ["fp16", "int2", ""])
def test_a_precision_that_the_target_lacks_is_refused(precision):
    spec = tiny.policy()
    graph = denoise(spec, stages.parameters(tiny.model(spec)))
    with pytest.raises(ValueError, match="expected one of fp32, int8, int8-row, int4"):
        lower(graph, spec, Target(precision, 8))


# ---------------------------------------------------------------------------------------------- cache in place


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_attention_itself_takes_and_gives_the_cache(precision, tmp_path):
    """A node between them would be a copy of the whole cache per layer and token."""
    spec = tiny.policy()
    graph = stages.lowered(language(spec, stages.parameters(tiny.model(spec))), spec, precision)
    path = stages.save(graph, tmp_path)
    optimized = stages.optimized(path, tmp_path / "optimized.onnx")
    for file in (path, optimized):
        model = onnx.load(str(file), load_external_data=False)
        attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
        assert len(attention) == spec.language.layers
        for i, node in enumerate(attention):
            assert list(node.input[3:5]) == [f"past_key_{i}", f"past_value_{i}"]
            assert list(node.output[1:3]) == [f"present_key_{i}", f"present_value_{i}"]
        readers = [
            node for node in model.graph.node if any(name.startswith(("past_", "present_")) for name in node.input)
        ]
        assert readers == attention


@pytest.mark.parametrize("precision", PRECISIONS)
def test_present_may_share_the_memory_of_past(precision, tmp_path):
    spec = tiny.policy()
    model = tiny.model(spec, scale=0.15)
    path = stages.save(stages.lowered(language(spec, stages.parameters(model)), spec, precision), tmp_path)
    shared, apart = (stages.Stage(path, spec, in_place=there) for there in (True, False))
    prompt = stages.prompt(spec, 20, [(4, 4)])
    for inputs in (prompt.rows(0, 12), prompt.rows(12, 18), prompt.rows(18, 20)):
        before = {name: array.copy() for name, array in shared.cache.items()}
        length = shared.length
        found, expected = shared(inputs), apart(inputs)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        for name, array in shared.cache.items():
            np.testing.assert_array_equal(array[:, :, :length], before[name][:, :, :length])
            np.testing.assert_array_equal(array[:, :, : shared.length], apart.cache[name][:, :, : shared.length])
            assert not array[:, :, shared.length :].any()


def test_memory_that_was_never_written_is_never_read(tmp_path):
    """Buffers need no clearing between queries, nor after a rejected draft."""
    spec = tiny.policy()
    model = tiny.model(spec, scale=0.15)
    stage = stages.Stage(
        stages.save(stages.lowered(language(spec, stages.parameters(model)), spec), tmp_path), spec, in_place=True
    )
    prompt = stages.prompt(spec, 20)
    clean = stage(prompt)
    stage.restart(garbage=float("nan"))
    for name, value in stage(prompt).items():
        np.testing.assert_array_equal(value, clean[name])


@pytest.mark.parametrize("position", [stages.CAPACITY, 10**6])
def test_a_position_behind_the_capacity_is_an_error_not_a_number(position, tmp_path):
    spec = tiny.policy()
    path = stages.save(stages.lowered(language(spec, stages.parameters(tiny.model(spec))), spec), tmp_path)
    prompt = stages.prompt(spec, 4)
    beyond = replace(prompt, positions=prompt.positions + np.array([[0], [0], [position - 3]]))
    with pytest.raises(Exception, match="out of"):
        stages.Stage(path, spec, in_place=True)(beyond)
