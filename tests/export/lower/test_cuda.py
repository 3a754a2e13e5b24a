"""The cuda target, as far as a machine without a GPU can tell: what is refused, what the graphs are made of, and what
they compute where the CPU has kernels for the same nodes. No CUDA kernel was run.
"""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support import stages, tiny

from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.exporter import Settings, export, plan
from chatvla_edge.export.lower import cuda
from chatvla_edge.export.lower.onnxruntime import Target
from chatvla_edge.export.robots import load
from chatvla_edge.export.stages.language import language
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.policy import Policy

INT8 = Settings(target="cuda", precision="int8", robot=load("arx_r5_bimanual"), max_reasoning=8, gates=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "c"
    spec, layout, _ = PRESETS["tiny"]
    synthesize(directory, spec, layout)
    return open_checkpoint(directory)


@pytest.fixture(scope="module", params=["int8", "int4"])
def both(request, tmp_path_factory):
    """The language stage of one model, lowered for cuda and for cpu, both on the CPU."""
    spec, folder = tiny.policy(), tmp_path_factory.mktemp(request.param)
    neutral = language(spec, stages.parameters(tiny.model(spec)))
    ours = stages.save(cuda.lower(neutral, spec, Target(request.param, stages.CAPACITY)), folder, "cuda")
    theirs = stages.save(stages.lowered(neutral, spec, request.param), folder, "cpu")
    return spec, ours, theirs


def half(stage):
    stage.cache = {name: array.astype(np.float16) for name, array in stage.cache.items()}
    return stage


def test_attention_in_float16_is_that_of_the_cpu_but_for_rounding(both):
    spec, ours, theirs = both
    found, expected = half(stages.Stage(ours, spec, in_place=True)), stages.Stage(theirs, spec, in_place=True)
    inputs = stages.prompt(spec, 14, [(4, 6)])
    for piece in (inputs, stages.prompt(spec, 2, seed=1), stages.prompt(spec, 6, seed=2)):
        a, b = found(piece), expected(piece)
        assert stages.relative(a["hidden"], b["hidden"]) < 2e-2
        assert a["hidden"].dtype == np.float32
    for name, rows in found.rows().items():
        assert stages.relative(rows, expected.rows()[name]) < 2e-2


def test_caches_are_float16_and_everything_else_that_goes_in_and_out_is_what_it_was(both):
    _, ours, theirs = both
    kinds = []
    for path in (ours, theirs):
        graph = onnx.load(str(path), load_external_data=False).graph
        kinds.append({port.name: port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)})
    assert kinds[0].keys() == kinds[1].keys()
    for name, kind in kinds[0].items():
        is_cache = name.startswith(("past_", "present_"))
        assert kind == (TensorProto.FLOAT16 if is_cache else kinds[1][name]), name


def test_the_attention_sees_float16_alone(both):
    model = onnx.load(str(both[1]), load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == 3
    for node in attentions:
        q, k, v = (made[name] for name in node.input[:3])
        assert v.op_type == "Unsqueeze"
        for cast in (q, k, made[v.input[0]]):
            assert cast.op_type == "Cast"
            assert cast.attribute[0].i == TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp32"}, "attention on CUDA has no fp32 kernel.*choose int8 or int4, or the target cpu"),
        ({"precision": "bf16"}, "choose int8 or int4"),
        ({"gates": True}, "export with --no-gates"),
    ],
)
def test_what_cuda_cannot_run_is_refused_in_a_blink_with_what_to_choose(checkpoint, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(checkpoint, replace(INT8, **changes))


@pytest.mark.parametrize("size", [12, 264])
def test_heads_that_no_kernel_takes_are_refused(size):
    sizes = tiny.language(head_dim=size, mrope_section=(size // 2 - 4, 2, 2))
    with pytest.raises(ValueError, match=f"heads of {size}.*Choose the target cpu"):
        cuda.require(tiny.policy().model_copy(update={"language": sizes}), "int8")


def test_the_manifest_says_cuda_and_this_version_does_not_run_it(checkpoint, tmp_path):
    bundle = export(checkpoint, tmp_path / "b", INT8, lambda _name, _count: None)
    assert bundle.manifest.target.name == "cuda"
    assert bundle.manifest.stages.language.kv.dtype == "float16"
    with pytest.raises(ValueError, match="expected one for cpu"):
        Policy(bundle.path, bundle.manifest, Threads(1))
