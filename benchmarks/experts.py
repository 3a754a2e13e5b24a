"""One layer of routed experts alone, at real size, as the cpu target holds it, beside the reference's loop.

- decode: one row in PyTorch, the same row twice in the engine (row independence wants even rows). Four rows that visit
  four disjoint pairs of experts take turns, so that no cache holds the weights from one call to the next. Beside it a
  buffer is read, in the same rounds, by the same number of threads: from pages of 4 KiB, as the engine's own memory
  has them, and from pages of 2 MiB.
- 16 and 256 rows: what verification and prefill do, as a share of the float32 matrix product's peak.
- one row and two: maps of one expert with one row and with two, which is what the even-row rule costs.

Bytes are those of the weights and scales of the visited experts; FLOPs those of their matrix products.
"""

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.method import Batch, Comparison, Work, compare
from chatvla_edge.benchmarks.peaks import beyond_caches, buffer, gemm_peak, streaming_read
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.export.checkpoint.synth import PRESETS
from chatvla_edge.export.lower.onnxruntime import Target, lower
from chatvla_edge.export.model.experts import MixtureOfExperts
from chatvla_edge.export.quantize import PRECISIONS
from chatvla_edge.export.spec import LanguageSpec, PolicySpec
from chatvla_edge.export.stages import functions
from chatvla_edge.export.stages.graph import DOMAIN, Graph
from chatvla_edge.export.stages.weights import Parameters, linear
from chatvla_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine, Threads

SUMMARY = "One layer of routed experts: decode against read bandwidth, prefill against PyTorch, cost of even rows."

GEOMETRY = "chatvla2-2b"
NARROW = 560  # --quick: a sixteenth of the width, which caches hold
MAPS = 16  # one expert's gate or up map each; int4: 7 MiB each, beyond a 32 MiB cache together
ROWS = (16, 256)
FORMS = ("fp32", "int8", "int8-row", "int4")  # int4-row has the experts of int4
GOAL_BANDWIDTH = 0.9
GOAL_PREFILL = 1.5

Float = NDArray[np.float32]


def experts_graph(language: LanguageSpec, parameters: Parameters) -> Graph:
    """x [T, D] -> y [T, D]: router and routed experts of one layer."""
    count, width, hidden = language.experts.routed, language.routed_width, language.hidden
    graph = Graph("experts")
    x = graph.input("x", TensorProto.FLOAT, ("T", hidden))
    logits = linear(graph, parameters, x, "router", count, hidden, bias=language.experts.router_bias)
    halves = [f"routed.{e}.{part}.weight" for e in range(count) for part in ("gate_proj", "up_proj")]
    gate_up = parameters.stacked(graph, "gate_up", (count, 2 * width, hidden), halves)
    downs = [f"routed.{e}.down_proj.weight" for e in range(count)]
    down = parameters.stacked(graph, "down", (count, hidden, width), downs)
    graph.function(functions.top_k_moe(language))
    y = graph.op("TopKMoE", x, logits, gate_up, down, domain=DOMAIN)
    graph.output(y, "y", TensorProto.FLOAT, ("T", hidden))
    return graph


def maps_graph(language: LanguageSpec, parameters: Parameters) -> Graph:
    """x [T, D] -> the gate and up maps of the experts, each [T, I], one after the other and unweighted."""
    graph = Graph("maps")
    x = graph.input("x", TensorProto.FLOAT, ("T", language.hidden))
    names = [f"routed.{e}.{part}" for e in range(language.experts.routed) for part in ("gate_proj", "up_proj")]
    for index, name in enumerate(names[:MAPS]):
        y = linear(graph, parameters, x, name, language.routed_width, language.hidden, bias=False)
        graph.output(y, f"y{index}", TensorProto.FLOAT, ("T", language.routed_width))
    return graph


def write(graph: Graph, spec: PolicySpec, precision: str, folder: Path) -> Path:
    """Lower and write one graph, unless an earlier call did; the path of its file."""
    path = folder / f"{graph.name}_{precision}.onnx"
    if not path.is_file():
        lower(graph, spec, Target(precision, capacity=2)).save(path)
    return path


def engine_work(engine: OnnxRuntimeEngine, x: Float) -> Work:
    """One pass of the experts over `x` [T, D]."""
    y = np.zeros_like(x)
    return lambda: engine.run({"x": x}, {"y": y})


def disjoint_rows(model: MixtureOfExperts, hidden: int) -> Float:
    """Rows [E / k, D] which together visit each expert once."""
    chance = np.random.default_rng(1)
    rows: list[Float] = []
    seen: set[int] = set()
    experts = model.experts
    while len(rows) < experts.routed // experts.top_k:
        row = chance.standard_normal((1, hidden), np.float32)
        chosen = set(model.router(torch.from_numpy(row))[1].flatten().tolist())
        if not chosen & seen:
            rows.append(row)
            seen |= chosen
    return np.concatenate(rows)


def in_turns(works: list[Work]) -> Batch:
    """All of them, one after the other."""

    def turn() -> None:
        for work in works:
            work()

    return Batch(turn, len(works))


def visited_bytes(language: LanguageSpec, precision: str) -> float:
    """Bytes of weights and scales that one row reads: those of its k experts."""
    form, hidden, width = PRECISIONS[precision].experts, language.hidden, language.routed_width
    across, back = (32.0 if form is None else form.bits_per_weight(columns) for columns in (hidden, width))
    return (2 * across + back) / 8 * hidden * width * language.experts.top_k


def add_arguments(parser: ArgumentParser) -> None:
    """Budget, threads, and where to keep what takes a minute to make."""
    parser.add_argument("--seconds", type=float, help="for each candidate of a comparison; default: 4, quick: 0.5")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the engines' files for the next run")


class _Layer:
    """The reference's layer in two dtypes, and the files of the lowered one."""

    def __init__(self, width: int, folder: Path) -> None:
        spec = PRESETS[GEOMETRY][0]
        language = spec.language.model_copy(update={"intermediate": width})
        self.language = language
        torch.manual_seed(0)
        spec = spec.model_copy(update={"language": language})
        with torch.no_grad():
            self.eager = {"eager fp32": MixtureOfExperts(language).eval().requires_grad_(False)}
        state = self.eager["eager fp32"].state_dict()
        parameters = Parameters(lambda name: state[name])
        self.files = {
            precision: write(experts_graph(language, parameters), spec, precision, folder) for precision in FORMS
        }
        self.maps = {
            precision: write(maps_graph(language, parameters), spec, precision, folder) for precision in FORMS[1:]
        }
        self.rows = disjoint_rows(self.eager["eager fp32"], language.hidden)
        halved = MixtureOfExperts(language).to(torch.bfloat16)
        halved.load_state_dict(state)
        self.eager["eager bf16"] = halved.eval().requires_grad_(False)

    def loop(self, name: str, x: Float) -> Work:
        """The reference's loop over experts on `x`."""
        model = self.eager[name]
        rows = torch.from_numpy(x).to(next(model.parameters()).dtype)
        return lambda: model(rows)


def decode(layer: _Layer, threads: int, seconds: float, nbytes: int) -> Comparison:
    """One token at a time, and a buffer read beside it."""
    engines = {precision: OnnxRuntimeEngine(file, Threads(threads)) for precision, file in layer.files.items()}
    rows = [layer.rows[index : index + 1] for index in range(len(layer.rows))]
    works: dict[str, Work | Batch] = {name: in_turns([layer.loop(name, row) for row in rows]) for name in layer.eager}
    for precision, engine in engines.items():
        works[precision] = in_turns([engine_work(engine, np.repeat(row, 2, axis=0)) for row in rows])
    for name, huge in (("read, 4 KiB pages", False), ("read, 2 MiB pages", True)):
        works[name] = streaming_read(buffer(nbytes, huge=huge), threads)
    return compare(_named(works, f"decode, {_threads(threads)}"), seconds=seconds)


def many(layer: _Layer, count: int, threads: int, seconds: float) -> Comparison:
    """`count` rows at once."""
    x = np.random.default_rng(2).standard_normal((count, layer.language.hidden), np.float32)
    works: dict[str, Work | Batch] = {name: layer.loop(name, x) for name in layer.eager}
    for precision, file in layer.files.items():
        works[precision] = engine_work(OnnxRuntimeEngine(file, Threads(threads)), x)
    return compare(_named(works, f"{count} rows, {_threads(threads)}"), seconds=seconds)


def one_or_two(layer: _Layer, threads: int, seconds: float) -> dict[str, Comparison]:
    """Maps of the experts with one row and with two equal ones."""
    found = {}
    for precision, file in layer.maps.items():
        engine = OnnxRuntimeEngine(file, Threads(threads))
        works: dict[str, Work | Batch] = {}
        for name, count in (("one row", 1), ("two rows", 2)):
            x = np.repeat(layer.rows[:1], count, axis=0)
            outputs = {
                f"y{index}": np.zeros((count, layer.language.routed_width), np.float32)
                for index in range(min(MAPS, 2 * layer.language.experts.routed))
            }
            works[name] = Batch(_bound(engine, x, outputs), len(outputs))
        found[precision] = compare(_named(works, f"one map, {precision}, {_threads(threads)}"), seconds=seconds)
    return found


def _bound(engine: OnnxRuntimeEngine, x: Float, outputs: dict[str, Float]) -> Work:
    return lambda: engine.run({"x": x}, outputs)


def _named(works: dict[str, Work | Batch], what: str) -> dict[str, Work | Batch]:
    return {f"{what}: {name}": work for name, work in works.items()}


def _threads(count: int) -> str:
    return f"{count} thread{'s'[: count > 1]}"


def run(options: Namespace) -> Report:
    """Decode, 16 and 256 rows, one row and two; each at every number of threads."""
    seconds = options.seconds or (0.5 if options.quick else 4.0)
    width = NARROW if options.quick else PRESETS[GEOMETRY][0].language.routed_width
    nbytes = 1 << 26 if options.quick else beyond_caches()
    report = Report(title=f"One layer of routed experts: hidden 1536, {width} wide, 8 experts, top-2")
    too_small = f"--quick takes experts {width} wide, which caches hold" if options.quick else None
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(options.work or temporary) / str(width)
        folder.mkdir(parents=True, exist_ok=True)
        layer = _Layer(width, folder)
        for threads in options.threads:
            torch.set_num_threads(threads)
            _one(report, layer, threads, seconds, nbytes, too_small)
    report.note("The router is part of every row. PyTorch decodes one row, the engine two equal ones.")
    return report


def _one(report: Report, layer: _Layer, threads: int, seconds: float, nbytes: int, too_small: str | None) -> None:
    language, told = layer.language, _threads(threads)
    found = decode(layer, threads, seconds, nbytes)
    report.add(found)
    for precision in FORMS:
        name = f"decode, {told}: {precision}"
        rate = visited_bytes(language, precision) / float(np.median(found.samples[name].values))
        report.figure(f"{name}: experts' bytes read", rate / 1e9, "GB/s")
        for pages in ("4 KiB pages", "2 MiB pages"):
            read = f"decode, {told}: read, {pages}"
            # Rates compare as times per byte do, pair by pair.
            share = found.ratio(read, over=name).value * visited_bytes(language, precision) / nbytes
            report.figure(f"{name}: share of read bandwidth, {pages}", share, "x")
            if precision == "int4" and pages == "4 KiB pages":
                _goal(
                    report,
                    f"routed experts decode int4, {told}: share of read bandwidth",
                    share,
                    GOAL_BANDWIDTH,
                    too_small,
                )
    peak = gemm_peak(threads, seconds=seconds)
    report.figure(f"float32 product, {told}", peak / 1e9, "GFLOP/s")
    for count in ROWS:
        found = many(layer, count, threads, seconds)
        report.add(found)
        flops = 6.0 * count * language.experts.top_k * language.hidden * language.routed_width
        for name, samples in found.samples.items():
            report.figure(f"{name}: share of GEMM peak", flops / float(np.median(samples.values)) / peak, "x")
        best = max(
            found.ratio(f"{count} rows, {told}: eager bf16", over=f"{count} rows, {told}: {precision}").value
            for precision in FORMS
        )
        if count == ROWS[-1]:
            name = f"routed experts, prefill {count}, {told}: best row-exact form over eager bf16"
            _goal(report, name, best, GOAL_PREFILL, too_small)
    for rows in one_or_two(layer, threads, seconds).values():
        report.add(rows)


def _goal(report: Report, name: str, value: float, goal: float, reason: str | None) -> None:
    report.goal(name, None if reason else value, ">=", goal, unit="x", reason=reason)


if __name__ == "__main__":
    sys.exit(script.main(__file__))
