"""Block-wise weight quantization: its error, its corner cases, and that ONNX Runtime reads the codes as we do."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from chatvla_edge.export.quantize import INT4, INT8, PRECISIONS, ROW8, BlockFormat, dequantize, quantize

FORMS = [INT8, INT4, BlockFormat(8, 32), BlockFormat(4, 16)]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.bits} bits, {form.block}")


def weights(seed: int, rows: int, columns: int, power: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 1, (rows, columns))
    return (values * 2.0**power).astype(np.float32)


def codes_of(quantized, form) -> np.ndarray:
    """[N, blocks, block], signed, spelled out."""
    codes = quantized.codes.astype(int)
    if form.bits == 4:
        codes = np.stack([codes % 16, codes // 16], axis=-1).reshape(*codes.shape[:2], -1)
    return codes - form.zero


@forms
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    power=st.integers(-100, 100),
)
@example(seed=0, rows=1, columns=1, power=0)
@example(seed=1, rows=2, columns=128, power=0)
@example(seed=2, rows=2, columns=129, power=0)
def test_every_element_is_within_half_a_step(form, seed, rows, columns, power):
    weight = weights(seed, rows, columns, power)
    quantized = quantize(weight, form)
    found = dequantize(quantized, form, columns)
    assert found.shape == weight.shape
    assert found.dtype == np.float32
    step = np.repeat(quantized.scales, form.block, axis=1)[:, :columns]
    assert (np.abs(found.astype(np.float64) - weight) <= step * (0.5 + 1e-6)).all()


@forms
def test_shapes_are_those_that_the_engine_expects(form):
    quantized = quantize(weights(0, 6, 300), form)
    blocks = -(-300 // form.block)
    assert quantized.codes.shape == (6, blocks, form.block * form.bits // 8)
    assert quantized.codes.dtype == np.uint8
    assert quantized.scales.shape == (6, blocks)
    assert quantized.scales.dtype == np.float32


@forms
def test_codes_are_symmetric_and_the_largest_value_is_exact(form):
    """The code of -2^(bits-1) is never used: +x and -x are equally far off."""
    weight = weights(3, 40, 2 * form.block)
    quantized = quantize(weight, form)
    codes = codes_of(quantized, form)
    limit = 2 ** (form.bits - 1) - 1
    assert np.abs(codes).max() == limit
    np.testing.assert_array_equal(np.abs(codes).max(axis=2), limit, err_msg="every block uses its whole range")
    np.testing.assert_array_equal(codes_of(quantize(-weight, form), form), -codes)


@forms
def test_zeros_stay_zero_and_padding_adds_nothing(form):
    weight = weights(4, 3, form.block + 5)
    weight[:, ::3] = 0
    weight[1] = 0
    quantized = quantize(weight, form)
    found = dequantize(quantized, form, weight.shape[1])
    assert not found[weight == 0].any()
    assert np.isfinite(quantized.scales).all()
    assert (quantized.scales > 0).all()
    assert not codes_of(quantized, form)[:, 1, 5:].any(), "columns that do not exist"


@forms
@pytest.mark.parametrize("largest", [1e-45, 1.4e-44, 2.5e-43, 1e-40, 1e-38, 1e-30, 1e30, 3.4e38], ids=str)
def test_any_finite_magnitude_stays_finite_and_close(form, largest):
    weight = np.linspace(-largest, largest, 2 * form.block, dtype=np.float64).astype(np.float32).reshape(1, -1)
    quantized = quantize(weight, form)
    found = dequantize(quantized, form, weight.shape[1])
    assert np.isfinite(found).all()
    assert np.abs(codes_of(quantized, form)).max() < form.zero
    step = float(weight.max()) / (form.zero - 1)
    # Where the step is a denormal it is rounded itself, by up to half the smallest number, times the largest code.
    assert np.abs(found.astype(np.float64) - weight).max() <= step * 0.51 + 2.0**-149 * form.zero


@forms
def test_a_large_value_spoils_its_own_block_only(form):
    weight = weights(5, 2, 3 * form.block)
    alone = dequantize(quantize(weight, form), form, weight.shape[1])
    weight[0, form.block + 1] = 1e4
    found = dequantize(quantize(weight, form), form, weight.shape[1])
    changed = (found != alone).any(axis=0).reshape(3, -1).any(axis=1)
    np.testing.assert_array_equal(changed, [False, True, False])
    np.testing.assert_array_equal(found[1], alone[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(bad):
    weight = weights(6, 3, 200)
    weight[2, 131] = bad
    with pytest.raises(ValueError, match=r"row 2 of \[3, 200\] holds NaN or infinity"):
        quantize(weight, INT8)


@forms
def test_a_large_map_is_the_same_as_its_rows(form, monkeypatch):
    """Maps are worked on some rows at a time."""
    weight = weights(12, 23, 200)
    whole = quantize(weight, form)
    monkeypatch.setattr("chatvla_edge.export.quantize.SLAB", 1000)
    by_rows = quantize(weight, form)
    np.testing.assert_array_equal(whole.codes, by_rows.codes)
    np.testing.assert_array_equal(whole.scales, by_rows.scales)


@pytest.mark.parametrize("columns", [64, 129, 300])
def test_one_scale_per_row_is_one_block_as_long_as_the_row(columns):
    weight = weights(13, 7, columns)
    rows, block = quantize(weight, ROW8), quantize(weight, BlockFormat(8, columns))
    np.testing.assert_array_equal(rows.codes, block.codes)
    np.testing.assert_array_equal(rows.scales, block.scales)
    assert rows.scales.shape == (7, 1)
    np.testing.assert_array_equal(dequantize(rows, ROW8, columns), dequantize(block, BlockFormat(8, columns), columns))


def test_bits_count_codes_scales_and_padding():
    assert INT8.bits_per_weight(1536) == 8.25
    assert INT4.bits_per_weight(8960) == 4.25
    assert INT8.bits_per_weight(64) == 2 * (8 + 0.25), "half of the block is padding"
    assert ROW8.bits_per_weight(64) == 8.5


def test_a_precision_names_the_form_of_every_map():
    mixed, expert = PRECISIONS["int4-row"], "backbone.language.layers.3.mlp.routed.0.up_proj.weight"
    assert mixed.form(expert, (128, 64)) == INT4
    assert mixed.form("backbone.language.layers.3.self_attn.q_proj.weight", (64, 64)) == ROW8
    assert mixed.form("backbone.visual.blocks.0.mlp.fc1.weight", (128, 64)) == ROW8
    assert mixed.form("backbone.language.layers.3.mlp.router.weight", (64, 64)) is None
    assert mixed.form(expert, (128, 32)) is None
    assert PRECISIONS["fp32"].form(expert, (128, 64)) is None


# ------------------------------------------------------------------------------- ONNX Runtime reads the same weights


def product(x: np.ndarray, quantized, form: BlockFormat, columns: int, level: int) -> np.ndarray:
    """x W^T by ONNX Runtime's MatMulNBits."""
    rows = len(quantized.scales)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=form.bits,
        block_size=form.block,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", rows])],
        [numpy_helper.from_array(quantized.codes, "codes"), numpy_helper.from_array(quantized.scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@forms
@pytest.mark.parametrize("columns", [64, 128, 300, 588])
def test_onnx_runtime_computes_with_the_values_of_dequantize(form, columns):
    """Nibble order, centre, padding and the order of scales: any of them wrong is an error of the order of 1."""
    weight, x = weights(7, 70, columns), weights(8, 6, columns)
    quantized = quantize(weight, form)
    expected = x.astype(np.float64) @ dequantize(quantized, form, columns).astype(np.float64).T
    found = product(x, quantized, form, columns, level=0)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def rounded_rows(x: np.ndarray, block: int) -> np.ndarray:
    """What accuracy level 4 makes of activations: int8, one scale per block of a row."""
    padded = np.zeros((len(x), -(-x.shape[1] // block) * block))
    padded[:, : x.shape[1]] = x
    cut = padded.reshape(len(x), -1, block)
    step = np.abs(cut).max(axis=2, keepdims=True) / 127
    values = np.rint(cut / np.where(step == 0, 1, step)) * step
    return values.reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_level_4_rounds_activations_by_block_and_nothing_else(form, outlier):
    """So its error is known: half a step of each activation, which an outlier enlarges in its own block only."""
    weight, x = weights(9, 96, 640), weights(10, 6, 640)
    x[:, 200] *= outlier
    quantized = quantize(weight, form)
    values = dequantize(quantized, form, 640).astype(np.float64)
    found = product(x, quantized, form, 640, level=4)
    exact = x.astype(np.float64) @ values.T
    emulated = rounded_rows(x.astype(np.float64), form.block) @ values.T
    # A tie that rounds the other way in fp32 is one step of one activation; everything else is fp32 accumulation.
    step = np.abs(x).max(axis=1, keepdims=True) / 127 * np.abs(values).max()
    assert np.abs(found - emulated).max() <= 1e-5 * np.abs(exact).max() + step.max()
    assert np.median(np.abs(found - emulated)) <= 1e-6 * np.abs(exact).max()
    half = np.repeat(np.abs(x).reshape(6, -1, form.block).max(axis=2) / 254, form.block, axis=1)
    assert (np.abs(found - exact) <= half @ np.abs(values).T * 1.001).all()


def test_the_codes_are_valid_onnx():
    quantized = quantize(weights(11, 4, 128), INT4)
    tensor = numpy_helper.from_array(quantized.codes, "codes")
    assert tensor.data_type == TensorProto.UINT8
    onnx.checker.check_tensor(tensor)
