"""Every variant the paper and the public code know: its neutral graphs in plain ONNX Runtime are the reference.

Nothing here knows a lowering: nodes of our own domain run through the bodies that the files carry.
"""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support import stages, tiny, words

from chatvla_edge.export.checkpoint.synth import ARX, FRANKA
from chatvla_edge.export.model.ddim import Committed
from chatvla_edge.export.model.images import Preprocessing, Resize, patches
from chatvla_edge.export.model.policy import Observation, ReferencePolicy
from chatvla_edge.export.model.prompt import Prompt
from chatvla_edge.export.normalization import Normalization
from chatvla_edge.export.spec import ExpertsSpec, ReasoningSpec
from chatvla_edge.export.stages.denoise import condition, denoise
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.vision import vision

EXPERTS = {
    "dense": ExpertsSpec(),
    "static": ExpertsSpec(static=2, static_active=1),
    "dynamic 8/2": ExpertsSpec(routed=8, top_k=2),
    "dynamic 6/3": ExpertsSpec(routed=6, top_k=3, routed_width=40),
    "dynamic 4/2, no router bias": ExpertsSpec(routed=4, top_k=2, router_bias=False),
    "dynamic 4/1": ExpertsSpec(routed=4, top_k=1),
    "dynamic 4/4": ExpertsSpec(routed=4, top_k=4),
    "weights as they come": ExpertsSpec(routed=8, top_k=2, renormalize=False),
    "shared": ExpertsSpec(shared=2, shared_width=24),
    "shared + dynamic": ExpertsSpec(routed=4, top_k=2, shared=1),
    "two shared of their own width + dynamic": ExpertsSpec(routed=4, top_k=2, shared=2, shared_width=24),
    "shared through a gate": ExpertsSpec(routed=4, top_k=2, shared=1, shared_gate=True),
    "static + dynamic": ExpertsSpec(routed=6, top_k=3, static=2, static_active=1),
    "static + shared + dynamic": ExpertsSpec(routed=4, top_k=2, shared=1, static=2),
}

HEADS = {
    "latter": tiny.head(),
    "former": tiny.head(reasoning=ReasoningSpec(start=0, stop=2, final=False)),
    "full": tiny.head(reasoning=ReasoningSpec(start=0, stop=4)),
    "none": tiny.head(reasoning=None),
    "combine": tiny.head(reasoning=None, conditioning="combine", combine_width=48),
    "arx": tiny.head(**ARX),
    "franka": tiny.head(**FRANKA),
}


def saved(graph, folder):
    """The file, after the checker has seen it with shape inference through every body."""
    path = stages.save(graph, folder)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions[""] <= 20
    assert all(entry.version <= 20 for function in model.functions for entry in function.opset_import)
    assert {node.domain for node in model.graph.node} <= {"", "chatvla"}
    return path


def with_experts(experts, **changes):
    """Six heads over two groups: with as many groups as heads in one, two axes could be swapped unnoticed."""
    sizes = tiny.language(experts, **({"hidden": 96, "heads": 6} | changes))
    return tiny.policy().model_copy(update={"language": sizes, "head": None})


# ------------------------------------------------------------------------------------------------------ language


@pytest.mark.parametrize("name", EXPERTS)
def test_the_language_stage_is_the_reference(name, tmp_path):
    spec = with_experts(EXPERTS[name])
    model = tiny.model(spec, scale=0.15)
    stage = stages.Stage(saved(language(spec, stages.parameters(model)), tmp_path), spec)
    reference = stages.Reference(model)
    prompt = stages.prompt(spec, 21, [(4, 8)])
    stages.assert_same_pass(stage(prompt), reference(prompt))
    for token in (7, 11):
        at = stages.Pass(np.array([token]), np.full((3, 1), stage.length))
        stages.assert_same_pass(stage(at), reference(at))
    expected = reference.rows()
    for cached, rows in stage.rows().items():
        assert stages.relative(rows, expected[cached]) <= 1e-5


def test_an_output_head_of_its_own_is_used(tmp_path):
    spec = with_experts(tiny.DENSE, tied=False)
    model = tiny.model(spec, scale=0.15)
    stage = stages.Stage(saved(language(spec, stages.parameters(model)), tmp_path), spec)
    prompt = stages.prompt(spec, 12)
    stages.assert_same_pass(stage(prompt), stages.Reference(model)(prompt))


def test_epsilon_and_rotary_base_come_from_the_spec(tmp_path):
    spec = with_experts(tiny.DENSE, rms_eps=0.1, rope_theta=50.0, layers=1)
    model = tiny.model(spec, scale=0.15)
    stage = stages.Stage(saved(language(spec, stages.parameters(model)), tmp_path), spec)
    prompt = stages.prompt(spec, 21, [(4, 8)])
    stages.assert_same_pass(stage(prompt), stages.Reference(model)(prompt))


@pytest.mark.parametrize("experts", [tiny.DYNAMIC, EXPERTS["weights as they come"]], ids=["kept", "as they come"])
def test_a_second_runtime_reads_the_language_stage_alike(experts, tmp_path):
    """ONNX's own evaluator, written in numpy, shares no code with ONNX Runtime."""
    spec = with_experts(experts, layers=2)
    model = tiny.model(spec, scale=0.15)
    path = saved(language(spec, stages.parameters(model)), tmp_path)
    evaluator = ReferenceEvaluator(str(path))
    first, second = stages.prompt(spec, 14, [(4, 4)]).rows(0, 9, sum_stop=9), stages.prompt(spec, 14, [(4, 4)])
    second = second.rows(9, 14, first_row=2, sum_stop=3)
    reference = stages.Reference(model)
    shape = (1, spec.language.kv_heads, 16, spec.language.head_dim)
    past = {f"past_{kind}_{i}": np.zeros(shape, np.float32) for i in range(2) for kind in ("key", "value")}
    for length, inputs in ((0, first), (9, second)):
        found = dict(
            zip(
                evaluator.output_names,
                evaluator.run(None, inputs.feed(length, spec.language.hidden) | past),
                strict=True,
            )
        )
        past = {name: found.pop(name.replace("past", "present")) for name in past}
        stages.assert_same_pass(found, reference(inputs))


def test_sigmoid_routing_is_refused_with_the_reason():
    spec = with_experts(ExpertsSpec(routed=4, top_k=2, scoring="sigmoid"))
    with pytest.raises(ValueError, match=r"found scoring = 'sigmoid', expected 'softmax'. Train with"):
        language(spec, stages.parameters(tiny.model(spec)))


# -------------------------------------------------------------------------------------------------------- vision


@pytest.mark.parametrize("contrast", [1.0, 0.01], ids=["contrast", "dark"])  # dark: where the norms' epsilon counts
@pytest.mark.parametrize(("grid", "frames"), [((4, 8), 1), ((8, 4), 2), ((6, 6), 3), ((2, 2), 1), ((2, 10), 2)])
def test_the_vision_stage_is_the_reference(grid, frames, contrast, tmp_path):
    model = tiny.model(scale=0.15)
    stage = stages.session(saved(vision(model.spec, stages.parameters(model), grid), tmp_path))
    rng = np.random.default_rng(2)
    count = grid[0] * grid[1]
    folded = rng.normal(0, contrast, (frames, count, 3, 1, 196)).astype(np.float32)
    (found,) = stage.run(None, {"patches": folded.reshape(frames, count, -1)})
    doubled = torch.from_numpy(np.repeat(folded, 2, axis=3).reshape(frames * count, -1))
    expected = model.backbone.images(doubled, [grid] * frames).numpy()
    assert stages.relative(found.reshape(expected.shape), expected) <= 1e-5


def test_frames_of_one_batch_do_not_see_each_other(tmp_path):
    model = tiny.model(scale=0.15)
    stage = stages.session(saved(vision(model.spec, stages.parameters(model), (4, 4)), tmp_path))
    patches = np.random.default_rng(3).normal(0, 1, (3, 16, 588)).astype(np.float32)
    (together,) = stage.run(None, {"patches": patches})
    for frame, tokens in zip(patches, together, strict=True):
        assert stages.relative(stage.run(None, {"patches": frame[None]})[0][0], tokens) <= 1e-6


# ---------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("fusion", ["sum", "film"])
@pytest.mark.parametrize("name", HEADS)
def test_condition_and_denoise_are_the_reference(name, fusion, tmp_path):
    spec = tiny.policy(tiny.DENSE, head_spec=HEADS[name], fusion=fusion)
    model = tiny.model(spec, scale=0.15)
    head, weights = spec.head, stages.parameters(model)
    modulate = stages.session(saved(condition(spec, weights), tmp_path))
    stage = stages.session(saved(denoise(spec, weights), tmp_path))
    rng = np.random.default_rng(6)

    def draw(*shape):
        return rng.normal(0, 1, shape).astype(np.float32)

    feed = {"prompt_mean": draw(1, 64), "reasoning_mean": draw(1, 64), "state": draw(1, head.state_dim)}
    (modulations,) = modulate.run(None, feed)
    prompt, reasoning, state = (torch.from_numpy(value) for value in feed.values())
    conditions = model.head.condition(*model.fusion(prompt[0], reasoning[0]), state[0])
    conditions = tuple(each[None] for each in conditions)
    committed = Committed(
        prefix=torch.from_numpy(draw(head.horizon, head.action_dim)).clamp(-1, 1),
        mask=torch.linspace(1, 0, head.horizon),
    )
    for row, at in zip(modulations, stages.ddim.steps(spec.sampler), strict=True):
        x = torch.from_numpy(draw(head.horizon, head.action_dim))
        epsilon = model.head(x[None], torch.tensor([at.timestep]), conditions)[0]
        for held in (None, committed):
            expected = stages.ddim.step(x, epsilon, at, held).numpy()
            # Zeros when nothing is committed, as the design has it.
            prefix = np.zeros_like(expected) if held is None else held.prefix.numpy()
            mask = np.zeros(head.horizon, np.float32) if held is None else held.mask.numpy()
            feed = {"x": x.numpy(), "modulation": row[None], "coefficients": np.array(at.coefficients, np.float32)}
            (found,) = stage.run(None, feed | {"prefix": prefix, "mask": mask})
            assert stages.relative(found, expected) <= 1e-5


@pytest.mark.parametrize("steps", [(100, 10), (50, 7), (10, 10), (100, 1)])
def test_modulations_have_a_row_for_every_step_of_the_sampler(steps, tmp_path):
    spec = tiny.policy(tiny.DENSE)
    spec = spec.model_copy(
        update={"sampler": spec.sampler.model_copy(update={"train_steps": steps[0], "steps": steps[1]})}
    )
    model = tiny.model(spec, scale=0.15)
    stage = stages.session(saved(condition(spec, stages.parameters(model)), tmp_path))
    rng = np.random.default_rng(7)
    feed = {name: rng.normal(0, 1, (1, 64)).astype(np.float32) for name in ("prompt_mean", "reasoning_mean")}
    feed["state"] = rng.normal(0, 1, (1, 14)).astype(np.float32)
    (found,) = stage.run(None, feed)
    prompt, reasoning, state = (torch.from_numpy(value) for value in feed.values())
    observed, reasoned = model.head.condition(*model.fusion(prompt, reasoning), state)
    expected = []
    for at in stages.ddim.steps(spec.sampler):
        time = model.head.t_embedder(torch.tensor([at.timestep]))
        parts = [
            block.adaLN_modulation(time + (reasoned if i >= 2 else observed))
            for i, block in enumerate(model.head.blocks)
        ]
        expected.append(torch.cat([*parts, model.head.final_layer.adaLN_modulation(time + reasoned)], dim=1)[0])
    assert stages.relative(found, torch.stack(expected).numpy()) <= 1e-5


# --------------------------------------------------------------------------------------------------- whole queries

SMALL = Preprocessing.of(Resize(height=56, width=84, filter="bicubic"))
WIDE = Preprocessing.of(Resize(height=28, width=112, filter="bicubic"))
CAMERAS = {"one": [SMALL], "two alike": [SMALL, SMALL], "three, two grids": [SMALL, WIDE, SMALL]}


def reference_policy(spec, cameras) -> ReferencePolicy:
    head = spec.head
    ones = np.ones(head.state_dim, np.float32), np.ones(head.action_dim, np.float32)
    normalization = Normalization(0 * ones[0], ones[0], -ones[1], ones[1])
    return ReferencePolicy(tiny.model(spec, scale=0.15), Prompt(words.tokenizer(), tiny.TOKENS), cameras, normalization)


@pytest.mark.parametrize("cameras", CAMERAS)
@pytest.mark.parametrize(
    "spec",
    [
        tiny.policy(),
        tiny.policy(EXPERTS["shared + dynamic"], fusion="film", head_spec=HEADS["combine"]),
        tiny.policy(EXPERTS["dynamic 6/3"], head_spec=HEADS["franka"]),
    ],
    ids=["ChatVLA-2", "film, combine", "6/3, franka"],
)
def test_a_whole_query_answers_as_the_reference(spec, cameras, tmp_path):
    policy = reference_policy(spec, CAMERAS[cameras])
    rng = np.random.default_rng(9)
    images = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in CAMERAS[cameras]]
    state = rng.normal(0, 1, spec.head.state_dim).astype(np.float32)
    noise = policy.noise(seed=3)
    answer = policy.query(Observation(images=images, state=state), "Pick the card.", noise, max_tokens=12)

    rows, grids = zip(
        *(patches(steps(image)) for steps, image in zip(policy.preprocessing, images, strict=True)), strict=True
    )
    query = stages.Query(policy.model, tmp_path, grids)
    ids = np.array(policy.prompt.ids(grids, "Pick the card."))
    tokens, prompt_mean, reasoning_mean, visits = query.generate(ids, query.image_tokens(list(rows)), 12)
    assert tokens == answer.token_ids
    np.testing.assert_array_equal(visits, answer.routing)
    assert stages.relative(prompt_mean, answer.prompt_mean) <= 1e-5
    assert stages.relative(reasoning_mean, answer.reasoning_mean) <= 1e-5
    chunk = query.sample(noise.numpy(), query.modulations(prompt_mean, reasoning_mean, state))
    np.testing.assert_allclose(chunk, answer.normalized, rtol=0, atol=1e-4)


def test_committed_actions_come_back_unchanged(tmp_path):
    policy = reference_policy(tiny.policy(), [SMALL])
    head = policy.model.spec.head
    query = stages.Query(policy.model, tmp_path, [(4, 6)])
    rng = np.random.default_rng(11)
    prefix = rng.uniform(-1, 1, (head.horizon, head.action_dim)).astype(np.float32)
    mask = np.array([1] * 4 + [0] * 6, np.float32)
    modulations = query.modulations(*rng.normal(0, 1, (2, 64)), rng.normal(0, 1, head.state_dim))
    noise = policy.noise(seed=1).numpy()
    chunk = query.sample(noise, modulations, Committed(torch.from_numpy(prefix), torch.from_numpy(mask)))
    np.testing.assert_array_equal(chunk[:4], prefix[:4])
    free = query.sample(noise, modulations)
    assert np.abs(chunk - free)[4:].max() > 1e-3
