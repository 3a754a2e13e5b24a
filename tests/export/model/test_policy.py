"""One query end to end, on the tiny model: what it depends on, what it refuses, what it counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import naive, tiny, words

from chatvla_edge.export.model.backbone import mrope_positions
from chatvla_edge.export.model.ddim import Committed
from chatvla_edge.export.model.images import Preprocessing, Resize, Rotate180, patches
from chatvla_edge.export.model.policy import ChatVLA2, Observation, ReferencePolicy
from chatvla_edge.export.model.prompt import Prompt
from chatvla_edge.export.normalization import Normalization
from chatvla_edge.export.spec import QWEN2_VL_2B, ExpertsSpec, PolicySpec, VisionSpec, scaledp

INSTRUCTION = "Answer the question and pick the card."
CAMERA = Preprocessing.of(Resize(height=56, width=84, filter="bicubic"))
EXPERTS = [
    tiny.DYNAMIC,
    ExpertsSpec(routed=4, top_k=2, shared=1),
    ExpertsSpec(routed=6, top_k=3, static=2, static_active=1),
]


def normalization(actions: int = 14, states: int = 14) -> Normalization:
    rng = np.random.default_rng(3)
    low = rng.normal(-2, 1, actions).astype(np.float32)
    return Normalization(
        state_mean=rng.normal(0, 1, states).astype(np.float32),
        state_std=rng.uniform(0.1, 1, states).astype(np.float32),
        action_min=low,
        action_max=low + rng.uniform(0.5, 3, actions).astype(np.float32),
    )


def policy(spec: PolicySpec | None = None, cameras=(CAMERA, CAMERA), **changes) -> ReferencePolicy:
    model = tiny.model(spec, **changes)
    return ReferencePolicy(model, Prompt(words.tokenizer(), tiny.TOKENS), cameras, normalization())


@pytest.fixture(scope="module")
def reference():
    return policy()


@pytest.fixture(scope="module")
def observation():
    rng = np.random.default_rng(4)
    images = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2)]
    return Observation(images=images, state=rng.normal(0, 1, 14).astype(np.float32))


@pytest.fixture(scope="module")
def noise(reference):
    return reference.noise(seed=0)


def ask(reference, observation, noise, **more):
    return reference.query(observation, INSTRUCTION, noise, **{"max_tokens": 12, **more})


@pytest.fixture(scope="module")
def answer(reference, observation, noise):
    return ask(reference, observation, noise)


def assert_same_words(one, other):
    assert one.token_ids == other.token_ids
    assert one.text == other.text
    for name in ("prompt_mean", "reasoning_mean", "routing"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_same_query_with_the_same_noise_has_the_same_answer(reference, observation, noise, answer):
    again = ask(reference, observation, noise)
    assert_same_words(answer, again)
    np.testing.assert_array_equal(answer.chunk, again.chunk)
    np.testing.assert_array_equal(answer.normalized, again.normalized)


@pytest.mark.parametrize("kind", ["sum", "film"])
def test_the_chunk_follows_from_two_means_the_state_and_the_noise_as_published(observation, noise, kind):
    reference = policy(tiny.policy(fusion=kind), scale=0.15)
    found = ask(reference, observation, noise)
    statistics, spec = reference.normalization, reference.head_spec
    w = naive.split_qkv(naive.weights_of(reference.model, "head."))
    means = found.prompt_mean.astype(np.float64), found.reasoning_mean.astype(np.float64)
    vectors = naive.fuse(naive.weights_of(reference.model, "fusion."), kind, *means)
    state = (observation.state.astype(np.float64) - statistics.state_mean) / statistics.state_std
    condition = naive.conditions(w, spec, *vectors, state)
    expected = naive.sample(noise.double().numpy(), lambda x, t: naive.predict_noise(w, spec, x, t, *condition))
    np.testing.assert_allclose(found.normalized, expected, rtol=0, atol=1e-4)


def test_a_seed_names_its_noise(reference):
    assert torch.equal(reference.noise(5), reference.noise(5))
    assert not torch.equal(reference.noise(5), reference.noise(6))


def test_other_noise_changes_the_chunk_and_nothing_else(reference, observation, answer):
    other = ask(reference, observation, reference.noise(seed=1))
    assert_same_words(answer, other)
    assert np.abs(answer.normalized - other.normalized).max() > 1e-2


def test_the_answer_has_the_shapes_of_the_spec(answer):
    assert answer.chunk.shape == answer.normalized.shape == (10, 14)
    assert answer.chunk.dtype == np.float32
    assert answer.prompt_mean.shape == answer.reasoning_mean.shape == (64,)
    assert len(answer.token_ids) == 12


def test_the_chunk_lies_within_the_action_range(answer):
    statistics = normalization()
    span = statistics.action_max - statistics.action_min
    assert np.abs(answer.normalized).max() <= 1
    assert np.abs(answer.normalized).min() < 0.9
    np.testing.assert_allclose(answer.chunk, statistics.action_min + (answer.normalized + 1) / 2 * span, atol=1e-5)
    rounding = 1e-6 * np.abs([statistics.action_min, statistics.action_max]).max()
    assert (answer.chunk >= statistics.action_min - rounding).all()
    assert (answer.chunk <= statistics.action_max + rounding).all()


@pytest.mark.parametrize("experts", EXPERTS, ids=lambda e: e.summary)
def test_every_token_but_the_last_visits_k_experts_in_every_layer(observation, noise, experts):
    reference = policy(tiny.policy(experts))
    answer = ask(reference, observation, noise)
    prompt = reference.prompt.ids([(4, 6), (4, 6)], INSTRUCTION)
    assert prompt.count(tiny.TOKENS.image_pad) == 12
    rows = len(prompt) + len(answer.token_ids) - 1
    assert answer.routing.shape == (3, experts.routed)
    assert answer.routing.sum(1).tolist() == [rows * experts.top_k] * 3


def test_the_camera_order_matters(reference, observation, noise, answer):
    swapped = ask(reference, replace(observation, images=observation.images[::-1]), noise)
    assert np.abs(swapped.prompt_mean - answer.prompt_mean).max() > 1e-4
    assert np.abs(swapped.normalized - answer.normalized).max() > 1e-5


def test_images_stand_in_the_prompt_in_camera_order(observation, noise):
    wide, tall = CAMERA, Preprocessing.of(Resize(height=84, width=56, filter="bicubic"))
    for cameras, grids in (((wide, tall), [(4, 6), (6, 4)]), ((wide, wide), [(4, 6), (4, 6)])):
        reference = policy(cameras=cameras)
        backbone = reference.model.backbone
        tokens = []
        for image, camera, grid in zip(observation.images, cameras, grids, strict=True):
            tokens.append(backbone.images(torch.from_numpy(patches(camera(image))[0]), [grid]))
        ids = torch.tensor(reference.prompt.ids(grids, INSTRUCTION))
        positions, _ = mrope_positions(ids, grids, tiny.TOKENS.image_pad)
        hidden = backbone.hidden(backbone.embed(ids, torch.cat(tokens)), positions)
        found = ask(reference, observation, noise).prompt_mean
        np.testing.assert_allclose(found, hidden.mean(0), rtol=0, atol=1e-5)


def test_each_camera_has_its_own_preprocessing(observation, noise, answer):
    turned = policy(cameras=(CAMERA, Preprocessing.of(Rotate180(), *CAMERA.root)))
    left, right = observation.images
    by_hand = Observation(images=[left, np.ascontiguousarray(right[::-1, ::-1])], state=observation.state)
    np.testing.assert_allclose(
        ask(turned, observation, noise).chunk, ask(policy(), by_hand, noise).chunk, rtol=0, atol=0
    )


def test_state_and_instruction_reach_the_chunk(reference, observation, noise, answer):
    moved = ask(reference, replace(observation, state=observation.state + 0.5), noise)
    assert_same_words(answer, moved)
    assert np.abs(moved.normalized - answer.normalized).max() > 1e-3
    told = reference.query(observation, "Put the cup away.", noise, max_tokens=12)
    assert np.abs(told.prompt_mean - answer.prompt_mean).max() > 1e-4
    assert np.abs(told.normalized - answer.normalized).max() > 1e-5


def test_the_reasoning_steers_the_latter_half_of_the_head(reference, observation, noise, answer):
    shorter = ask(reference, observation, noise, max_tokens=4)
    assert shorter.token_ids == answer.token_ids[:4]
    np.testing.assert_array_equal(shorter.prompt_mean, answer.prompt_mean)
    assert np.abs(shorter.reasoning_mean - answer.reasoning_mean).max() > 1e-4
    assert np.abs(shorter.normalized - answer.normalized).max() > 1e-5


def test_one_generated_token_is_a_finite_answer(reference, observation, noise):
    """Where the public code raises or returns NaN."""
    single = ask(reference, observation, noise, max_tokens=1)
    assert len(single.token_ids) == 1
    assert np.isfinite(single.chunk).all()
    assert np.isfinite(single.reasoning_mean).all()


def test_committed_actions_come_back_and_the_rest_stays_free(reference, observation, noise, answer):
    mask = torch.zeros(10)
    unused = ask(reference, observation, noise, committed=Committed(torch.zeros(10, 14), mask))
    np.testing.assert_array_equal(unused.chunk, answer.chunk)
    prefix = torch.full((10, 14), 0.25)
    mask[:3] = 1
    held = ask(reference, observation, noise, committed=Committed(prefix, mask))
    np.testing.assert_array_equal(held.normalized[:3], prefix[:3])
    assert np.abs(held.normalized[3:] - answer.normalized[3:]).max() > 1e-4  # attention sees the committed rows


@pytest.mark.parametrize("fusion", ["sum", "film"])
def test_every_family_answers(observation, noise, fusion):
    for head in (tiny.head(reasoning=None), tiny.head(reasoning=None, conditioning="combine"), tiny.head()):
        reference = policy(tiny.policy(tiny.DENSE, fusion=fusion, head_spec=head))
        assert np.isfinite(ask(reference, observation, noise).chunk).all()


def test_a_blind_policy_may_answer(observation, noise):
    blind = ask(policy(cameras=()), replace(observation, images=[]), noise)
    assert np.isfinite(blind.chunk).all()


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_images_is_refused(reference, observation, noise, count):
    images = [observation.images[0]] * count
    with pytest.raises(ValueError, match=f"found {count} images, expected 2"):
        ask(reference, replace(observation, images=images), noise)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(reference, observation, noise, value):
    state = observation.state.copy()
    state[3] = value
    with pytest.raises(ValueError, match="14 finite numbers"):
        ask(reference, replace(observation, state=state), noise)


def test_a_state_of_another_robot_is_refused(reference, observation, noise):
    with pytest.raises(ValueError, match="14 finite numbers"):
        ask(reference, replace(observation, state=observation.state[:7]), noise)


@pytest.mark.parametrize("shape", [(16, 14), (10, 10), (1, 10, 14), (140,)])
def test_noise_of_another_shape_is_refused(reference, observation, shape):
    with pytest.raises(ValueError, match=r"the noise has shape .* expected \[10, 14\]"):
        ask(reference, observation, torch.zeros(shape))


@pytest.mark.parametrize(("prefix", "mask"), [((10, 14), (1,)), ((1, 14), (10,)), ((10, 14), (10, 14)), ((10,), (10,))])
def test_a_committed_prefix_of_another_shape_is_refused(reference, observation, noise, prefix, mask):
    with pytest.raises(ValueError, match="committed prefix and mask"):
        ask(reference, observation, noise, committed=Committed(torch.zeros(prefix), torch.ones(mask)))


def test_statistics_of_another_robot_are_refused():
    parts = tiny.model(), Prompt(words.tokenizer(), tiny.TOKENS), (CAMERA,)
    with pytest.raises(ValueError, match="describe a state of 7, the head takes 14"):
        ReferencePolicy(*parts, normalization(states=7))
    with pytest.raises(ValueError, match="describe 10 actions, the head makes 14"):
        ReferencePolicy(*parts, normalization(actions=10))


def test_a_model_without_a_head_makes_no_policy():
    spec = tiny.policy().model_copy(update={"head": None})
    with pytest.raises(ValueError, match="no action head"):
        ReferencePolicy(ChatVLA2(spec), Prompt(words.tokenizer(), tiny.TOKENS), (CAMERA,), normalization())


# ----------------------------------------------------------------------------------------- the published geometry


def counted(experts: ExpertsSpec, head) -> dict[str, int]:
    spec = PolicySpec(vision=VisionSpec(), language=QWEN2_VL_2B.model_copy(update={"experts": experts}), head=head)
    model = ChatVLA2.on_meta(spec)
    parts = {"total": model, "vision": model.backbone.visual, "language": model.backbone.language}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def test_dense_has_the_parameters_of_qwen2_vl_2b():
    found = counted(ExpertsSpec(), None)
    assert found == {"total": 2_208_985_600, "vision": 665_271_296, "language": 1_543_714_304}


def test_the_papers_model_has_11_264_814_062_parameters():
    head = scaledp("H", action_dim=14, state_dim=14, horizon=50, reasoning="latter")
    found = counted(ExpertsSpec(routed=8, top_k=2), head)
    assert found == {"total": 11_264_814_062, "vision": 665_271_296, "language": 9_636_443_872}


def test_a_spec_survives_json():
    spec = tiny.policy(EXPERTS[1], fusion="film")
    assert PolicySpec.model_validate_json(spec.model_dump_json()) == spec
