"""A bundle's stages beside what else could run them: torch.compile, plain ONNX, OpenVINO.

A policy of two decoder layers, two vision blocks and four blocks of the head, of real size and with random weights;
nothing is extrapolated. All candidates of a stage run in the same rounds, PyTorch eager fp32 is the baseline.

- compiled: `torch.compile` of the vision tower, of the head and of each expert; the loop over experts stays Python,
  since which experts a row visits is data.
- plain ONNX: what an exporter gives that does not know the mixture, all experts for all rows; fp32, in ONNX Runtime.
- OpenVINO: the same neutral stages with a loop over the chosen experts in standard operators, in OpenVINO's own choice
  of precision for this processor, which the report states.

What a peer computes is compared with the fp32 plain ONNX file once, so that none is fast because it is wrong.
"""

import copy
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import inliner

from chatvla_edge.benchmarks import script, stages
from chatvla_edge.benchmarks.method import Work, compare
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS
from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.experts import MLP
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.spec import LanguageSpec, PolicySpec
from chatvla_edge.export.stages.denoise import denoise
from chatvla_edge.export.stages.graph import DOMAIN, Graph, Weight
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.vision import vision
from chatvla_edge.export.stages.weights import Parameters

SUMMARY = "A bundle's stages beside torch.compile, a plain ONNX export with all experts, and OpenVINO."

PRECISIONS = ("int8", "int8-row", "int4-row")
STAGES = ("vision", f"prefill {stages.BEHIND}", "decode", "denoise")
OPENVINO = "OpenVINO is not installed here, so its column is missing: `pip install openvino` brings it."

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]


# ------------------------------------------------------------------------------------------------------ plain graphs


def plain(graph: Graph, spec: LanguageSpec, *, all_experts: bool) -> Graph:
    """The stage with its routed experts in standard operators: all of them for all rows, or a loop over the chosen."""
    out = Graph(
        graph.name,
        scope="plain/",
        weights=dict(graph.weights),
        constants=dict(graph.constants),
        inputs=graph.inputs,
        outputs=graph.outputs,
        output_values=graph.output_values,
        functions={name: body for name, body in graph.functions.items() if name != "TopKMoE"},
        domains=dict(graph.domains),
    )
    for node in graph.nodes:
        if node.domain == DOMAIN and node.op_type == "TopKMoE":
            _experts(out, graph, node, spec, all_experts=all_experts)
        else:
            out.nodes.append(node)
    used = {name for node in out.nodes for name in node.input}
    out.weights = {name: weight for name, weight in out.weights.items() if name in used}
    return out


def _experts(out: Graph, graph: Graph, node: onnx.NodeProto, spec: LanguageSpec, *, all_experts: bool) -> None:
    x, logits, gate_up, down = node.input
    op, const = out.op, out.constant
    kept, ids = out.op_many("TopK", logits, const([spec.experts.top_k], np.int64), outputs=2, axis=-1)
    nothing = op("Mul", logits, const(0.0, np.float32))
    shares = op("ScatterElements", nothing, ids, op("Softmax", kept, axis=-1), axis=1)  # [T, E]
    total = op("Mul", x, const(0.0, np.float32))
    for index in range(spec.experts.routed):
        column = const([index], np.int64)
        share = op("Gather", shares, column, axis=1)
        if all_experts:
            total = op("Add", total, op("Mul", _expert(out, graph, x, gate_up, down, index, spec), share))
            continue
        chosen = op("ReduceMax", op("Cast", op("Equal", ids, column), to=onnx.TensorProto.INT32), const([1], np.int64))
        places = op("Transpose", op("NonZero", op("Squeeze", chosen, const([1], np.int64))), perm=[1, 0])
        made = _expert(out, graph, op("GatherND", x, places), gate_up, down, index, spec)
        total = op("ScatterND", total, places, op("Mul", made, op("GatherND", share, places)), reduction="add")
    op("Identity", total)
    out.nodes[-1].output[0] = node.output[0]


def _expert(out: Graph, graph: Graph, x: str, gate_up: str, down: str, index: int, spec: LanguageSpec) -> str:
    def one(name: str) -> str:
        stacked = graph.weights[name]
        assert stacked.entry is not None
        return out.weight(Weight(f"{name}.{index}", stacked.shape[1:], stacked.dtype, partial(stacked.entry, index)))

    halves = out.constant([spec.routed_width] * 2, np.int64)
    gate, up = out.op_many("Split", out.op("Gemm", x, one(gate_up), transB=1), halves, outputs=2, axis=1)
    inner = out.op("Mul", out.op("Mul", gate, out.op("Sigmoid", gate)), up)
    return out.op("Gemm", inner, one(down), transB=1)


def write(folder: Path, spec: PolicySpec, parameters: Parameters) -> dict[str, dict[str, Path]]:
    """Stage -> candidate -> inlined file; vision and denoise have no experts and one file for both."""
    (grid,) = {camera.grid for camera in stages.ROBOT.cameras}
    graphs = {
        "vision": vision(spec, parameters, grid),
        "language": language(spec, parameters),
        "denoise": denoise(spec, parameters),
    }
    files: dict[str, dict[str, Path]] = {}
    for stage, graph in graphs.items():
        for kind, all_experts in (("all", True), ("chosen", False)):
            path = folder / f"{stage}_{kind}.onnx"
            if stage != "language" and kind == "chosen":
                path = files[stage]["all"]
            elif not path.is_file():
                plain(graph, spec.language, all_experts=all_experts).save(path)
                model = onnx.load(str(path), load_external_data=False)
                onnx.save(inliner.inline_local_functions(model), str(path))
            files.setdefault(stage, {})[kind] = path
    return files


# ---------------------------------------------------------------------------------------------------------- engines


def ort(path: Path, threads: int) -> Run:
    """A file in ONNX Runtime as it comes, spinning aside."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, feed), strict=True))


def openvino(path: Path, threads: int, report: Report) -> Run:
    """A file in OpenVINO as it comes, with so many threads."""
    module = importlib.import_module("openvino")
    core = module.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    told = f"OpenVINO computes in {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()} here."
    if told not in report.notes:
        report.note(told)
    request = compiled.create_infer_request()
    outputs = {next(iter(port.names)): port for port in compiled.outputs}

    def run(feed: Mapping[str, NDArray[Any]]) -> Arrays:
        found = request.infer(dict(feed), share_inputs=True, share_outputs=True)
        return {name: found[port] for name, port in outputs.items()}

    return run


def compiled(model: ChatVLA2) -> ChatVLA2:
    """The model over the same parameters, its tower, head and experts compiled."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared)
    twin.backbone.visual.compile()
    twin.head.compile()
    for module in twin.backbone.language.modules():
        if isinstance(module, MLP):
            module.compile(dynamic=True)
    return twin


# ------------------------------------------------------------------------------------------------------------ feeds


def feeds(spec: PolicySpec) -> dict[str, Arrays]:
    """Stage -> inputs of the neutral graph; decode stands behind `stages.BEHIND` rows of what its cache holds."""
    assert spec.head is not None
    head, model, chance = spec.head, spec.language, np.random.default_rng(0)
    (grid,) = {camera.grid for camera in stages.ROBOT.cameras}
    ids = chance.integers(0, min(model.vocab, 256), stages.BEHIND + 1)
    cache = (1, model.kv_heads, stages.CAPACITY, model.head_dim)
    past = {f"past_{kind}_{i}": np.zeros(cache, np.float32) for i in range(model.layers) for kind in ("key", "value")}

    def rows(start: int, stop: int) -> Arrays:
        return {
            "token_ids": ids[start:stop],
            "image_tokens": np.zeros((0, model.hidden), np.float32),
            "image_rows": np.zeros(0, np.int64),
            "positions": np.ascontiguousarray(np.broadcast_to(np.arange(start, stop), (3, stop - start))),
            "length": np.array([start]),
            "first_row": np.array([stop - start - 1]),
            "sum_stop": np.array([0]),
            **past,
        }

    chunk = (head.horizon, head.action_dim)
    first = ddim.steps(spec.sampler)[0]
    return {
        "vision": {"patches": chance.standard_normal((1, grid[0] * grid[1], 588), np.float32)},
        f"prefill {stages.BEHIND}": rows(0, stages.BEHIND),
        "decode": rows(stages.BEHIND, stages.BEHIND + 1),
        "denoise": {
            "x": chance.standard_normal(chunk, np.float32),
            "modulation": np.zeros((1, (6 * head.depth + 2) * head.width), np.float32),
            "coefficients": np.asarray(first.coefficients, np.float32),
            "prefix": np.zeros(chunk, np.float32),
            "mask": np.zeros(head.horizon, np.float32),
        },
    }


WATCHED = {"vision": "image_tokens", "denoise": "x_next"}


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """RMS of the difference over RMS of what was expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2.0)) / np.sqrt(np.mean(expected**2.0)))


# ----------------------------------------------------------------------------------------------------------- the run


def measure(
    report: Report,
    folder: Path,
    spec: PolicySpec,
    preset: str,
    threads: Sequence[int],
    seconds: float,
    *,
    compiling: bool,
) -> None:
    """All stages, every candidate, at every number of threads."""
    stages.write_subject(folder, spec, preset, PRECISIONS)
    checkpoint = open_checkpoint(folder / "checkpoint")
    files = write(folder, spec, Parameters(checkpoint.tensor))
    subject = stages.open_subject(folder, PRECISIONS)
    models = dict(subject.models)
    if compiling:
        models |= {name.replace("eager", "compiled"): compiled(model) for name, model in subject.models.items()}
    given, has_openvino = feeds(spec), importlib.util.find_spec("openvino") is not None
    for count in threads:
        torch.set_num_threads(count)
        torch_works = {name: stages.eager_stages(model) for name, model in models.items()}
        bundles = {name: stages.bundle_stages(bundle, count) for name, bundle in subject.bundles.items()}
        told = f"{count} thread{'s'[: count > 1]}"
        for file, names in (("vision", STAGES[:1]), ("language", STAGES[1:3]), ("denoise", STAGES[3:])):
            runs = {"plain ONNX, all experts": ort(files[file]["all"], count)}
            if has_openvino:
                runs["OpenVINO"] = openvino(files[file]["chosen"], count, report)
            for stage in names:
                works: dict[str, Work] = {
                    f"{stage}, {told}: {name}": found[stage] for name, found in torch_works.items()
                }
                works |= {f"{stage}, {told}: {name}": found[stage] for name, found in bundles.items()}
                works |= {f"{stage}, {told}: {name}": partial(run, given[stage]) for name, run in runs.items()}
                _agree(report, stage, told, {name: run(given[stage]) for name, run in runs.items()})
                with torch.no_grad():
                    report.add(compare(works, seconds=seconds, least_rounds=5))
            runs.clear()
    if not has_openvino:
        report.note(OPENVINO)


def _agree(report: Report, stage: str, told: str, found: Mapping[str, Arrays]) -> None:
    """Say how far peers are from the first of them, and refuse one that computes something else."""
    name = WATCHED.get(stage, "hidden")
    expected, *others = ((peer, np.array(outputs[name])) for peer, outputs in found.items())
    for peer, value in others:
        far = difference(value, expected[1])
        report.figure(f"{stage}, {told}: {peer}: relative difference from {expected[0]}", far, "")
        if not far < 0.1:
            raise RuntimeError(
                f"{stage}: {peer} differs from {expected[0]} by {far:.2g} of it, expected rounding alone"
            )


def add_arguments(parser: ArgumentParser) -> None:
    """Budget, threads, and where to keep what takes minutes to make."""
    parser.add_argument("--seconds", type=float, default=0.3, help="for each candidate of a comparison; default: 0.3")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep checkpoint and files for the next run")


def run(options: Namespace) -> Report:
    """Layers of real size; `--quick`: the tiny model, one thread."""
    report = Report(title="Two layers of real size beside other engines")
    versions = {name: _version(name) for name in ("torch", "onnxruntime", "openvino")}
    report.note("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version) + ".")
    with _folder(options.work) as folder:
        if options.quick:
            report.title = "The tiny model beside other engines"
            report.note("--quick compiles nothing: that alone takes a minute.")
            given = PRESETS["tiny"][0], "tiny", options.threads[:1], min(options.seconds, 0.1)
        else:
            given = stages.shortened(2, 2, 4), stages.GEOMETRY, options.threads, options.seconds
        measure(report, folder, *given, compiling=not options.quick)
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(script.main(__file__))
