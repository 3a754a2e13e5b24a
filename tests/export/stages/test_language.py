"""One language graph serves prefill, chunked prefill, verification and decode: however a prompt is cut, the reference's
single pass over it is the answer."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import stages, tiny

from chatvla_edge.export.spec import ExpertsSpec
from chatvla_edge.export.stages.language import language

ROWS = 22
FORMS = ["neutral", "fp32"]


@pytest.fixture(scope="module")
def spec():
    return tiny.policy().model_copy(update={"language": tiny.language(ExpertsSpec(routed=6, top_k=2))})


@pytest.fixture(scope="module")
def model(spec):
    return tiny.model(spec, scale=0.15)


@pytest.fixture(scope="module", params=FORMS)
def stage(request, spec, model, tmp_path_factory):
    graph = language(spec, stages.parameters(model))
    lowered = request.param != "neutral"
    graph = stages.lowered(graph, spec) if lowered else graph
    path = stages.save(graph, tmp_path_factory.mktemp("language"))
    return stages.Stage(path, spec, in_place=lowered)


@pytest.fixture(scope="module")
def prompt(spec):
    return stages.prompt(spec, ROWS, [(4, 4), (2, 4)])


@pytest.fixture(scope="module")
def whole(model, prompt):
    reference = stages.Reference(model)
    return reference(prompt) | reference.rows()


def together(parts, key):
    return np.concatenate([part[key] for part in parts])


def assert_same_rows(stage, parts, whole):
    for key in ("token", "hidden", "top2_logits", *(key for key in whole if key.startswith("routing_"))):
        found = together(parts, key)
        if found.dtype == np.int64:
            np.testing.assert_array_equal(found, whole[key], err_msg=key)
        else:
            assert stages.relative(found, whole[key]) <= 1e-5, key
    assert stages.relative(sum(part["hidden_sum"] for part in parts), whole["hidden_sum"]) <= 1e-5
    for name, rows in stage.rows().items():
        assert stages.relative(rows, whole[name]) <= 1e-5, name


def run(stage, prompt, cuts):
    stage.restart()
    return [stage(prompt.rows(a, b, sum_stop=b - a)) for a, b in pairwise(cuts)]


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, ROWS - 1)))
def test_any_chunking_of_a_prompt_gives_the_rows_of_one_pass(stage, prompt, whole, cuts):
    assert_same_rows(stage, run(stage, prompt, [0, *sorted(cuts), ROWS]), whole)


def test_row_by_row_is_the_same_prompt(stage, prompt, whole):
    assert_same_rows(stage, run(stage, prompt, range(ROWS + 1)), whole)


def test_chunks_may_begin_and_end_at_an_image_or_hold_none_of_it(stage, prompt, whole):
    images = prompt.image_rows
    assert list(images) == [2, 3, 4, 5, 6, 7], "two images side by side, four tokens and two"
    for cuts in ([0, 2, 8, ROWS], [0, 1, 6, 7, ROWS], [0, 4, ROWS], [0, 8, 9, ROWS]):
        assert_same_rows(stage, run(stage, prompt, cuts), whole)


def test_a_rejected_draft_leaves_nothing_behind(stage, prompt, whole, spec):
    """Verification writes rows that turn out wrong; the next pass overwrites them and never sees the rest."""
    stage.restart()
    first = stage(prompt.rows(0, 15, sum_stop=15))
    stage(stages.Pass(np.arange(20), np.tile(np.arange(15, 35), (3, 1))))
    stage.length = 15
    assert_same_rows(stage, [first, stage(prompt.rows(15, ROWS, sum_stop=ROWS - 15))], whole)


def test_rows_behind_the_pass_stay_as_they_were(stage, prompt):
    stage.restart(garbage=123.0)
    stage(prompt.rows(0, 9))
    before = {name: array.copy() for name, array in stage.cache.items()}
    stage(prompt.rows(9, 14))
    for name, array in stage.cache.items():
        np.testing.assert_array_equal(array[:, :, :9], before[name][:, :, :9], err_msg=name)
        assert (array[:, :, 9:14] != 123).any()
        assert (array[:, :, 14:] == 123).all()


def test_rows_behind_the_pass_are_not_read(stage, prompt, whole):
    stage.restart(garbage=1e4)
    assert_same_rows(stage, [stage(prompt)], whole)


def test_a_cache_can_be_filled_to_its_last_row(stage, spec, model):
    stage.restart()
    rows = stages.CAPACITY
    prompt = stages.prompt(spec, rows, seed=5)
    expected = stages.Reference(model)(prompt)
    parts = [stage(prompt.rows(0, rows - 3)), stage(prompt.rows(rows - 3, rows))]
    np.testing.assert_array_equal(together(parts, "token"), expected["token"])
    assert stages.relative(together(parts, "hidden"), expected["hidden"]) <= 1e-5


@pytest.mark.parametrize("first", [0, 1, ROWS - 2, ROWS - 1])
def test_outputs_are_for_the_rows_from_first_row_on(stage, prompt, whole, first):
    stage.restart()
    found = stage(prompt.rows(0, ROWS, first_row=first))
    assert found["token"].shape == (ROWS - first,)
    np.testing.assert_array_equal(found["token"], whole["token"][first:])
    assert stages.relative(found["hidden"], whole["hidden"][first:]) <= 1e-5
    assert stages.relative(found["top2_logits"], whole["top2_logits"][first:]) <= 1e-5
    assert found["routing_0"].shape == (ROWS, 2), "routing is told for every row"


@pytest.mark.parametrize("stop", [0, 1, 13, ROWS])
def test_the_sum_is_over_the_rows_before_sum_stop_whatever_first_row_is(stage, prompt, whole, stop):
    stage.restart()
    found = stage(prompt.rows(0, ROWS, first_row=ROWS - 1, sum_stop=stop))["hidden_sum"]
    expected = whole["hidden"][:stop].sum(0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_the_two_best_logits_are_the_token_s_and_the_runner_up_s(stage, prompt, model, whole):
    stage.restart()
    found = stage(prompt)
    table = model.backbone.lm_head.weight.numpy()
    logits = np.sort(found["hidden"] @ table.T, axis=1)
    np.testing.assert_allclose(found["top2_logits"], logits[:, :-3:-1], rtol=1e-4)
    assert (found["top2_logits"][:, 0] > found["top2_logits"][:, 1]).all()


def test_length_is_a_tensor_and_capacity_a_shape_of_the_feed(spec, model, tmp_path):
    path = stages.save(language(spec, stages.parameters(model)), tmp_path)
    prompt = stages.prompt(spec, 12)
    outcomes = []
    for capacity in (12, 40):
        stage = stages.Stage(path, spec, capacity=capacity)
        inputs = {value.name: value.shape for value in stage.session.get_inputs()}
        assert inputs["length"] == [1]
        outcomes.append([stage(prompt.rows(0, 7)), stage(prompt.rows(7, 12))])
    for small, large in zip(*outcomes, strict=True):
        stages.assert_same_pass(small, large, tolerance=1e-6)


def test_present_is_declared_as_past_is(stage, spec):
    """A declaration that contradicts the node made ONNX Runtime drop the shape and warn."""
    inputs = {value.name: value.shape for value in stage.session.get_inputs()}
    outputs = {value.name: value.shape for value in stage.session.get_outputs()}
    for i in range(spec.language.layers):
        for kind in ("key", "value"):
            assert outputs[f"present_{kind}_{i}"] == inputs[f"past_{kind}_{i}"] == [1, 2, "C", 16]
