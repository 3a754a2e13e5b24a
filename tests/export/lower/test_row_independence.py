"""A row's numbers do not depend on the rows beside it, bit for bit: drafts verified in one pass are plain decoding.

The condition is an even number of rows in every pass and every expert; `even` pads a pass as a runtime does, by its
last row once more. Kernels differ by processor and by ONNX Runtime, so this holds where it has been run.
"""

import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import stages, tiny

from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.quantize import PRECISIONS
from chatvla_edge.export.spec import ExpertsSpec
from chatvla_edge.export.stages.graph import Graph
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.weights import Parameters, linear

ROWS = 46
EXPERTS = {
    "8/2": ExpertsSpec(routed=8, top_k=2),
    "6/3, shared through a gate": ExpertsSpec(routed=6, top_k=3, shared=1, shared_gate=True),
    "dense": ExpertsSpec(),
}


def even(stage: stages.Stage, inputs: stages.Pass) -> dict[str, np.ndarray]:
    """One pass with an even number of rows and of output rows; what the copy of the last row gave is dropped."""
    count, odd = len(inputs.ids), len(inputs.ids) % 2
    ids, positions = (
        np.append(inputs.ids, inputs.ids[-1:]),
        np.append(inputs.positions, inputs.positions[:, -1:], axis=1),
    )
    padded = replace(inputs, ids=ids[: count + odd], positions=positions[:, : count + odd])
    found = stage(replace(padded, first_row=inputs.first_row - (count + odd - inputs.first_row) % 2))
    stage.length -= odd
    rows = count - inputs.first_row
    kept = {name: found[name][-(rows + odd) :][:rows] for name in ("token", "top2_logits", "hidden")}
    return kept | {name: value[:count] for name, value in found.items() if name.startswith("routing_")}


def assert_rows_are_those_of_one_pass(stage, prompt, cuts):
    stage.restart()
    whole = even(stage, prompt)
    cache = stage.rows()
    stage.restart()
    parts = [even(stage, prompt.rows(a, b)) for a, b in pairwise(cuts)]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value, err_msg=name)
    for name, rows in stage.rows().items():
        np.testing.assert_array_equal(rows, cache[name], err_msg=name)


@pytest.fixture(scope="module", params=EXPERTS)
def spec(request):
    sizes = tiny.language(EXPERTS[request.param], hidden=192, heads=12, kv_heads=4, intermediate=136)
    return tiny.policy().model_copy(update={"language": sizes, "head": None})


@pytest.fixture(scope="module", params=PRECISIONS)
def stage(request, spec, tmp_path_factory):
    graph = stages.lowered(language(spec, stages.parameters(tiny.model(spec))), spec, request.param)
    return stages.Stage(stages.save(graph, tmp_path_factory.mktemp("rows")), spec, in_place=True)


@pytest.fixture(scope="module")
def prompt(spec):
    return stages.prompt(spec, ROWS, [(4, 8)])


@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, ROWS - 1)))
def test_any_chunking_gives_the_same_bits(stage, prompt, cuts):
    assert_rows_are_those_of_one_pass(stage, prompt, [0, *sorted(cuts), ROWS])


def test_decoding_row_by_row_gives_the_bits_of_one_pass(stage, prompt):
    assert_rows_are_those_of_one_pass(stage, prompt, [0, *range(9, ROWS + 1)])


@settings(max_examples=8, deadline=None)
@given(first=st.integers(0, ROWS - 1))
def test_a_token_does_not_depend_on_how_many_are_asked_for(stage, prompt, first):
    stage.restart()
    whole = even(stage, prompt)
    stage.restart()
    found = even(stage, replace(prompt, first_row=first))
    for name in ("token", "top2_logits", "hidden"):
        np.testing.assert_array_equal(found[name], whole[name][first:], err_msg=name)


@settings(max_examples=6, deadline=None)
@given(start=st.integers(2, ROWS - 4), wrong=st.integers(0, 299), seed=st.integers(0, 9))
def test_a_rejected_draft_leaves_no_bit_behind(stage, prompt, start, wrong, seed):
    stage.restart()
    whole = even(stage, prompt)
    stage.restart()
    even(stage, prompt.rows(0, start))
    draft = np.random.default_rng(seed).integers(0, 300, 14)
    even(stage, stages.Pass(np.append(wrong, draft), np.tile(np.arange(start, start + 15), (3, 1))))
    stage.length = start
    found = even(stage, prompt.rows(start, ROWS))
    for name in ("token", "top2_logits", "hidden"):
        np.testing.assert_array_equal(found[name], whole[name][start:], err_msg=name)


def test_experts_really_had_odd_batches(stage, prompt, spec):
    """Or the padding inside the experts has proved nothing."""
    stage.restart()
    found = even(stage, prompt)
    routed = spec.language.experts.routed
    visits = [np.bincount(ids.ravel(), minlength=routed) for name, ids in found.items() if name.startswith("routing_")]
    assert bool(visits) == bool(routed)
    assert not routed or (np.array(visits) % 2 == 1).any()


def test_more_threads_change_no_bit(spec, prompt, tmp_path):
    graph = language(spec, stages.parameters(tiny.model(spec)))
    for precision in PRECISIONS:
        path = stages.save(stages.lowered(graph, spec, precision), tmp_path)
        one, three = (even(stages.Stage(path, spec, in_place=True, threads=count), prompt) for count in (1, 3))
        for name, value in one.items():
            np.testing.assert_array_equal(three[name], value, err_msg=name)


@pytest.mark.parametrize("threads", [1, 2])
def test_integer_products_need_no_even_rows(threads, tmp_path):
    """int32 sums are exact: any number of rows gives the same bits, one row included."""
    spec = tiny.policy()
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(0, 0.1, (200, 300)).astype(np.float32))
    graph = Graph("map")
    x = graph.input("x", onnx.TensorProto.FLOAT, ("T", 300))
    y = linear(graph, Parameters(lambda _name: weight), x, "map", 200, 300, bias=False)
    graph.output(y, "y", onnx.TensorProto.FLOAT, ("T", 200))
    session = stages.session(stages.save(stages.lowered(graph, spec, "int8-row"), tmp_path), threads)
    rows = rng.normal(0, 1, (37, 300)).astype(np.float32) * np.logspace(-3, 3, 37, dtype=np.float32)[:, None]
    (whole,) = session.run(None, {"x": rows})
    for count in (1, 2, 3, 5, 16, 17, 36):
        for start in (0, 1, 37 - count):
            (part,) = session.run(None, {"x": rows[start : start + count]})
            np.testing.assert_array_equal(part, whole[start : start + count])


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_of_real_size_gives_the_same_bits(precision, tmp_path):
    """1536 x 8960, 12 heads of 128: other kernels and other splits than the small sizes take."""
    rows = 132  # beyond one block of 128 rows, which is how quantized products are split over threads
    experts = ExpertsSpec(routed=3, top_k=2)
    real = {"hidden": 1536, "heads": 12, "kv_heads": 2, "head_dim": 128, "intermediate": 8960}
    sizes = tiny.language(experts, **real, layers=1, vocab=512, mrope_section=(16, 24, 24), rope_theta=1e6)
    spec = tiny.policy().model_copy(update={"language": sizes, "head": None})
    shapes = {name: value.shape for name, value in ChatVLA2.on_meta(spec).state_dict().items()}

    def read(name):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shapes[name], generator=generator) * 0.02 + (1 if "norm" in name else 0)

    graph = stages.lowered(language(spec, Parameters(read)), spec, precision, capacity=rows + 2)
    path = stages.save(graph, tmp_path)
    prompt = stages.prompt(spec, rows, [(8, 12)])
    for threads, cuts in ((1, [0, 1, 2, 7, rows]), (2, [0, 65, *range(rows - 5, rows + 1)])):
        stage = stages.Stage(path, spec, in_place=True, threads=threads, capacity=rows + 2)
        assert_rows_are_those_of_one_pass(stage, prompt, cuts)
    path.with_name(path.name + ".data").unlink()
