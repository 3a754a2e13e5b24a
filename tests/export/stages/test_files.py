"""What a saved stage is on disk, what writing it costs, and that it depends on the spec and the weights alone."""

import hashlib
import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support import stages, tiny

from chatvla_edge.export.quantize import quantize
from chatvla_edge.export.stages.graph import ALIGNMENT, INLINE_BYTES, Graph, Weight
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.weights import Parameters

HERE = Path(__file__)


def digests(folder: Path) -> dict[str, str]:
    spec = tiny.policy()
    weights = stages.parameters(tiny.model(spec))
    for name, lay_out in stages.STAGES.items():
        graph = lay_out(spec, weights)
        stages.save(graph, folder)
        stages.save(stages.lowered(graph, spec, "int4"), folder, f"{name}.int4")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.slow
def test_the_same_spec_and_weights_give_the_same_bytes_in_any_process(tmp_path):
    here = digests(tmp_path / "here")
    assert len(here) == 16, "a graph and its weights for four stages, neutral and lowered"
    code = f"import sys; sys.path.insert(0, {str(HERE.parents[2])!r}); sys.path.insert(0, {str(HERE.parent)!r})\n"
    code += "import json, pathlib, test_files; print(json.dumps(test_files.digests(pathlib.Path(sys.argv[1]))))"
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        env=os.environ | {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(out.stdout) == here
    assert digests(tmp_path / "again") == here


@pytest.mark.parametrize("precision", [None, "fp32", "int8", "int4"])
@pytest.mark.parametrize("name", stages.STAGES)
def test_weights_lie_aligned_in_one_file_beside_the_graph(name, precision, tmp_path):
    spec = tiny.policy()
    graph = stages.STAGES[name](spec, stages.parameters(tiny.model(spec)))
    graph = stages.lowered(graph, spec, precision) if precision else graph
    path = stages.save(graph, tmp_path)
    data = path.with_name(f"{path.name}.data")
    end = 0
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            assert len(tensor.raw_data) <= max(INLINE_BYTES, 4 * 320)
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        offset, length = int(entry["offset"]), int(entry["length"])
        assert entry["location"] == data.name
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + length
        weight = graph.weights[tensor.name]
        assert length == weight.nbytes > INLINE_BYTES
        stored = np.memmap(data, weight.dtype, "r", offset, weight.shape)
        np.testing.assert_array_equal(stored, weight.array())
    assert end == data.stat().st_size


@pytest.mark.parametrize("precision", [None, "int8"])
def test_progress_adds_up_to_the_bytes_of_the_stage(precision, tmp_path):
    spec = tiny.policy()
    graph = language(spec, stages.parameters(tiny.model(spec)))
    graph = stages.lowered(graph, spec, precision) if precision else graph
    told: list[int] = []
    graph.save(tmp_path / "language.onnx", told.append)
    assert sum(told) == graph.weight_bytes
    assert all(count > 0 for count in told)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_every_parameter_is_read_once(precision, tmp_path):
    """A layer of experts is hundreds of megabytes: reading all of them for each would read 22 GB five times."""
    spec = tiny.policy()
    state, reads = tiny.model(spec).state_dict(), Counter()

    def read(name):
        reads[name] += 1
        return state[name]

    stages.save(stages.lowered(language(spec, Parameters(read)), spec, precision), tmp_path)
    tied = "backbone.language.embed_tokens.weight"
    expected = 1 if precision == "fp32" else 2  # the table in fp32, and quantized as the output head
    assert reads.pop(tied) == expected
    assert set(reads.values()) == {1}
    names = {name for name in state if name.startswith("backbone.language.")} - {tied}
    assert reads.keys() == names


def test_codes_are_let_go_once_they_are_written(monkeypatch, tmp_path):
    """Codes and scales are made together; kept until the end they would be the whole quantized stage."""
    made: list[weakref.ref] = []

    def watched(*arguments):
        quantized = quantize(*arguments)
        made.append(weakref.ref(quantized.codes))
        return quantized

    monkeypatch.setattr("chatvla_edge.export.lower.onnxruntime.quantize", watched)
    spec = tiny.policy()
    graph = stages.lowered(language(spec, stages.parameters(tiny.model(spec))), spec, "int8")
    counts: list[int] = []
    graph.save(tmp_path / "language.onnx", lambda _: counts.append(sum(codes() is not None for codes in made)))
    assert max(counts) == 1


def test_laying_out_and_lowering_read_nothing():
    def read(name):
        raise AssertionError(f"{name} was read")

    spec = tiny.policy()
    for lay_out in stages.STAGES.values():
        stages.lowered(lay_out(spec, Parameters(read)), spec, "int4")


@pytest.mark.parametrize("rows", [1, 7, 9, 4000])
@pytest.mark.parametrize("shape", [(8, 16), (400, 16)], ids=["inline", "external"])
def test_a_recipe_that_gives_another_size_is_refused(shape, rows, tmp_path):
    graph = Graph("wrong")
    weight = Weight("some.weight", shape, np.dtype(np.float32), lambda: iter([np.ones((rows, 16), np.float32)]))
    graph.weight(weight)
    expected = rf"some.weight: its recipe gave {rows * 64} bytes, its shape .* takes {shape[0] * 64}"
    with pytest.raises(ValueError, match=expected):
        graph.save(tmp_path / "wrong.onnx")


def test_a_stage_without_large_weights_is_one_file(tmp_path):
    graph = Graph("small")
    graph.output(graph.op("Identity", graph.input("x", TensorProto.FLOAT, (2,))), "y", TensorProto.FLOAT, (2,))
    assert [file.name for file in stages.save(graph, tmp_path).parent.iterdir()] == ["small.onnx"]


MEASURE = """
import resource, sys, zlib
from pathlib import Path
import torch
from chatvla_edge.export.lower.onnxruntime import Target, lower
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.spec import PolicySpec
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.weights import Parameters

torch.set_num_threads(1)
spec = PolicySpec.model_validate_json(sys.argv[1])
shapes = {name: value.shape for name, value in ChatVLA2.on_meta(spec).state_dict().items()}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
read = lambda name: torch.ones(shapes[name], dtype=torch.bfloat16)
warm = read("backbone.language.norm.weight").float().numpy()
before = peak()
graph = language(spec, Parameters(read))
if sys.argv[2] != "neutral":
    graph = lower(graph, spec, Target(sys.argv[2], 512))
graph.save(Path(sys.argv[3]))
print(peak() - before, graph.weight_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["neutral", "int8"])
def test_writing_a_stage_takes_memory_for_one_tensor_not_for_the_stage(form, tmp_path):
    """380 MB of fp32 weights whose largest tensor is a table of 67 MB, from a checkpoint in bf16."""
    real = {"hidden": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "mrope_section": (8, 12, 12), "layers": 6}
    sizes = tiny.language(tiny.DYNAMIC, **real, intermediate=1024, vocab=32768)
    spec = tiny.policy().model_copy(update={"language": sizes, "head": None})
    path = tmp_path / "language.onnx"
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, spec.model_dump_json(), form, str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    grown, written = map(int, out.stdout.split())
    largest = 4 * sizes.vocab * sizes.hidden
    if form == "neutral":
        assert written > 4 * largest, "or the bound says nothing"
    assert grown <= 2 * largest + (64 << 20)
    path.with_name("language.onnx.data").unlink()
