"""Each stage of a bundle, and whole queries, beside PyTorch eager on the same checkpoint.

- tiny: whole queries with a fixed number of tokens and no draft; then reasoning alone with drafts: the right one, as in
  steady state, and one with three wrong tokens. Both must give the tokens of plain decoding.
- real: layers of real size (hidden 1536, 8 experts of 8960, top-2, vocabulary 151936; vision width 1280; head width
  1280), two of the language model and of the vision tower and four of the head, and the same with half as many. What a
  layer costs is the difference of the two, pair by pair; a full model (28, 32 and 32 layers) is the smaller one and the
  missing layers at that price. Extrapolated rows say so. Weights are random, so experts are visited evenly.
- memory and load time: a process without torch opens the bundle, answers once and says what it holds.

PyTorch decodes and verifies on a cache that is cut back after each pass; the engine decodes two equal rows (row
independence). Text stands in place of image tokens in the prefill, which costs both the same.
"""

import gc
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from chatvla_edge.benchmarks import resident, script
from chatvla_edge.benchmarks.method import Batch, Comparison, Work, compare
from chatvla_edge.benchmarks.peaks import beyond_caches, buffer, gemm_peak, streaming_read
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.benchmarks.samples import difference
from chatvla_edge.export.checkpoint.reader import Checkpoint, open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.exporter import Settings, export
from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.model.policy import ChatVLA2, Observation, ReferencePolicy
from chatvla_edge.export.quantize import PRECISIONS
from chatvla_edge.export.robots import load
from chatvla_edge.export.spec import PolicySpec
from chatvla_edge.runtime.bundle import Bundle, open_bundle
from chatvla_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine, Threads
from chatvla_edge.runtime.policy import Policy
from chatvla_edge.runtime.prompt import PromptBuilder
from chatvla_edge.runtime.reasoning import LanguageModel, LanguageSizes, reason

SUMMARY = "Each stage and whole queries of a bundle beside PyTorch eager: tiny whole, layers of real size extrapolated."

ROBOT = load("arx_r5_bimanual")
GEOMETRY = "chatvla2-2b"
TOKENS = 50  # texts of the family have 34-96
CAPACITY = 512
BEHIND = 132  # rows of a prompt with one camera, and what decoding stands behind
PREFILLS = (BEHIND, 256)
VERIFIED = 16
READ_BYTES = beyond_caches() // 2  # two of them stand beside every model and engine
GOAL_QUERY = 5.0
GOAL_PASSES = 5
GOAL_REASONING = 3.0

Float = NDArray[np.float32]
Works = dict[str, Work | Batch]


# ------------------------------------------------------------------------------------------------ what is compared


@dataclass(frozen=True)
class Subject:
    """One checkpoint, the reference over it in two dtypes, and its bundles by precision."""

    checkpoint: Checkpoint
    models: dict[str, ChatVLA2]
    bundles: dict[str, Bundle]


def write_subject(folder: Path, spec: PolicySpec, preset: str, precisions: Sequence[str]) -> None:
    """Make a synthetic checkpoint and its bundles, leaving alone what an earlier call made."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        synthesize(checkpoint, spec, PRESETS[preset][1])
    for precision in precisions:
        if not (folder / precision).is_dir():
            settings = Settings(
                "cpu", precision, ROBOT, max_reasoning=TOKENS, capacity=CAPACITY, gates=False, threads=2
            )
            export(open_checkpoint(checkpoint), folder / precision, settings, lambda _name, _count: None)


def open_subject(folder: Path, precisions: Sequence[str]) -> Subject:
    """Load what `write_subject` made."""
    checkpoint = open_checkpoint(folder / "checkpoint")
    models = {"eager fp32": checkpoint.model(), "eager bf16": checkpoint.model(torch.bfloat16)}
    bundles = {precision: open_bundle(folder / precision, verify=False) for precision in precisions}
    return Subject(checkpoint, models, bundles)


def shortened(layers: int, blocks: int, head: int) -> PolicySpec:
    """The paper's policy with so many decoder layers, vision blocks and blocks of the head."""
    spec = PRESETS[GEOMETRY][0]
    assert spec.head is not None
    assert spec.head.reasoning is not None
    follows = spec.head.reasoning.model_copy(update={"start": head // 2, "stop": head})
    changes = {
        "vision": spec.vision.model_copy(update={"depth": blocks}),
        "language": spec.language.model_copy(update={"layers": layers}),
        "head": spec.head.model_copy(update={"depth": head, "reasoning": follows}),
    }
    return spec.model_copy(update=changes)


def language_model(bundle: Bundle, threads: int) -> LanguageModel:
    """The language stage of a bundle with a cache of its own."""
    manifest = bundle.manifest
    language = manifest.geometry.language
    sizes = LanguageSizes(
        language.layers,
        language.hidden,
        language.kv_heads,
        language.head_dim,
        language.experts.routed,
        language.experts.top_k,
        manifest.stages.language.kv.capacity,
    )
    engine = OnnxRuntimeEngine(bundle.path / manifest.stages.language.file, Threads(threads))
    return LanguageModel(engine, sizes, range(language.layers) if language.experts.routed else range(0))


def eager_stages(model: ChatVLA2) -> dict[str, Work]:
    """Stage -> one run of it by the reference."""
    spec, backbone = model.spec, model.backbone
    assert spec.head is not None
    head, chance = spec.head, np.random.default_rng(0)
    (grid,) = {camera.grid for camera in ROBOT.cameras}
    patches = torch.from_numpy(chance.standard_normal((grid[0] * grid[1], spec.vision.patch_values), np.float32))
    ids = torch.from_numpy(_ids(spec))
    dtype = backbone.lm_head.weight.dtype

    def rows(start: int, count: int, spoken: int, cache: DynamicCache) -> None:
        places = torch.arange(start, start + count).expand(3, -1)
        hidden = backbone.hidden(backbone.embed(ids[start : start + count]), places, cache)
        backbone.logits(hidden[-spoken:]).argmax(-1)

    filled = DynamicCache(config=backbone.language.config)
    rows(0, BEHIND, 1, filled)

    def behind(count: int) -> None:
        rows(BEHIND, count, count, filled)
        filled.crop(-count)

    def prefill(count: int) -> None:
        rows(0, count, 1, DynamicCache(config=backbone.language.config))

    mean, state = torch.zeros(spec.language.hidden), torch.zeros(1, head.state_dim)
    x = torch.from_numpy(chance.standard_normal((1, head.horizon, head.action_dim), np.float32))
    step = ddim.steps(spec.sampler)[0]
    timestep = torch.tensor([step.timestep])

    def conditions() -> tuple[torch.Tensor, torch.Tensor]:
        observed, reasoned = model.fusion(mean, mean)
        return model.head.condition(observed[None], reasoned[None], state.to(dtype))

    made = conditions()
    return {
        "vision": lambda: backbone.images(patches, [grid]),
        **{f"prefill {count}": partial(prefill, count) for count in PREFILLS},
        f"verify {VERIFIED}": partial(behind, VERIFIED),
        "decode": partial(behind, 1),
        "condition": conditions,
        "denoise": lambda: ddim.step(x, model.head(x.to(dtype), timestep, made), step),
    }


def bundle_stages(bundle: Bundle, threads: int) -> dict[str, Work]:
    """Stage -> one run of it by the bundle's engines."""
    manifest, chance = bundle.manifest, np.random.default_rng(0)
    stages, geometry = manifest.stages, manifest.geometry
    (seeing,) = stages.vision
    engines = {
        name: OnnxRuntimeEngine(bundle.path / stage.file, Threads(threads))
        for name, stage in (("vision", seeing), ("condition", stages.condition), ("denoise", stages.denoise))
    }
    count, merged = seeing.grid[0] * seeing.grid[1], geometry.vision.merge**2
    patches = chance.standard_normal((1, count, geometry.vision.channels * geometry.vision.patch**2), np.float32)
    seen = np.zeros((1, count // merged, geometry.language.hidden), np.float32)
    language, ids = language_model(bundle, threads), _ids_below(geometry.language.vocab)

    def rows(start: int, count: int, first_row: int) -> None:
        places = np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (3, count))
        language.forward(ids[start : start + count], places, length=start, first_row=first_row)

    rows(0, BEHIND, BEHIND - 1)
    head, steps = geometry.head, len(manifest.sampler.steps)
    mean, state = (np.zeros((1, width), np.float32) for width in (geometry.language.hidden, head.state_dim))
    modulations = np.zeros((steps, (6 * head.depth + 2) * head.width), np.float32)
    chunk = (head.horizon, head.action_dim)
    x, following = chance.standard_normal(chunk, np.float32), np.zeros(chunk, np.float32)
    first = manifest.sampler.steps[0]
    inputs = {
        "x": x,
        "modulation": modulations[:1],
        "coefficients": np.array([first.signal, first.noise, first.next_signal, first.next_noise], np.float32),
        "prefix": np.zeros(chunk, np.float32),
        "mask": np.zeros(head.horizon, np.float32),
    }

    def condition() -> None:
        given = {"prompt_mean": mean, "reasoning_mean": mean, "state": state}
        engines["condition"].run(given, {"modulations": modulations})

    def denoise() -> None:
        engines["denoise"].run(inputs, {"x_next": following})

    return {
        "vision": lambda: engines["vision"].run({"patches": patches}, {"image_tokens": seen}),
        **{f"prefill {count}": partial(rows, 0, count, count - 1) for count in PREFILLS},
        f"verify {VERIFIED}": partial(rows, BEHIND, VERIFIED, 0),
        "decode": partial(rows, BEHIND, 1, 0),
        "condition": condition,
        "denoise": denoise,
    }


STAGES = (
    "vision",
    *(f"prefill {count}" for count in PREFILLS),
    f"verify {VERIFIED}",
    "decode",
    "condition",
    "denoise",
)


DEPTHS = {"half": (1, 1, 2), "whole": (2, 2, 4)}  # decoder layers, vision blocks, blocks of the head
QUANTIZED = tuple(name for name in PRECISIONS if name != "fp32")
PARTS = ("tiny", "memory", "real")
OPTIONAL = ("prefill 256", f"verify {VERIFIED}")  # what no extrapolated query needs


def _ids(spec: PolicySpec) -> NDArray[np.int64]:
    return _ids_below(spec.language.vocab)


def _ids_below(vocab: int) -> NDArray[np.int64]:
    """A text of random bytes, as long as the longest pass."""
    return np.random.default_rng(3).integers(0, min(vocab, 256), max(PREFILLS))


# ------------------------------------------------------------------------------------------------------------ tiny


class Tiny:
    """Whole queries on the tiny model: every part of the policy, hardly any arithmetic."""

    def __init__(self, folder: Path, precisions: Sequence[str]) -> None:
        write_subject(folder, PRESETS["tiny"][0], "tiny", precisions)
        self.folder = folder
        self.subject = open_subject(folder, precisions)
        checkpoint = self.subject.checkpoint
        steps = [Preprocessing(camera.preprocessing) for camera in ROBOT.cameras]
        self.references = {
            name: ReferencePolicy(model, checkpoint.prompt(), steps, checkpoint.normalization())
            for name, model in self.subject.models.items()
        }
        chance = np.random.default_rng(0)
        camera = ROBOT.cameras[0]
        self.frame = chance.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
        self.state = np.zeros(checkpoint.spec.head.state_dim, np.float32)  # type: ignore[union-attr]

    def queries(self, threads: int) -> Works:
        """Name -> one whole query of `TOKENS` tokens."""
        works: Works = {}
        observation = Observation([self.frame], self.state)
        noise = next(iter(self.references.values())).noise(0)
        for name, reference in self.references.items():
            ask = partial(reference.query, observation, resident.INSTRUCTION, noise, max_tokens=TOKENS)
            works[name] = _checked(ask)
        for name, bundle in self.subject.bundles.items():
            policy = Policy(bundle.path, bundle.manifest, Threads(threads))
            works[name] = _checked(partial(policy.query, [self.frame], self.state, resident.INSTRUCTION, noise.numpy()))
        return works

    def reasoning(self, precision: str, threads: int) -> tuple[Works, dict[str, int]]:
        """Reasoning alone, plain and with drafts, and the passes of each; the same tokens asserted."""
        bundle = self.subject.bundles[precision]
        manifest = bundle.manifest
        policy = Policy(bundle.path, manifest, Threads(threads))
        image_tokens, model = policy.see([self.frame]), language_model(bundle, threads)
        grids = [camera.grid for camera in manifest.cameras]
        merge, tokenizer = manifest.geometry.vision.merge, bundle.path / manifest.tokenizer
        prompt = PromptBuilder.from_file(tokenizer, manifest.prompt, grids, merge).rows(resident.INSTRUCTION)

        def think(draft: Sequence[int]) -> Callable[[], object]:
            stop = manifest.prompt.tokens.stop[0]
            return partial(reason, model, prompt, image_tokens, stop=stop, max_tokens=TOKENS, draft=draft)

        plain = reason(model, prompt, image_tokens, stop=manifest.prompt.tokens.stop[0], max_tokens=TOKENS)
        wrong = list(plain.token_ids)
        for place in (len(wrong) // 4, len(wrong) // 2, 3 * len(wrong) // 4):
            wrong[place] = (wrong[place] + 1) % 256
        works: Works = {}
        passes = {}
        for name, draft in (("plain", []), ("right draft", plain.token_ids), ("draft with 3 wrong tokens", wrong)):
            works[name] = think(draft)
            found = think(draft)()
            if found.token_ids != plain.token_ids:  # type: ignore[attr-defined]
                raise RuntimeError(f"{precision}, {name}: found other tokens than plain decoding gives")
            passes[name] = found.passes  # type: ignore[attr-defined]
        return works, passes


def _checked(ask: Callable[[], object]) -> Work:
    """`ask`, once it was found to answer in the full number of tokens."""
    count = len(ask().token_ids)  # type: ignore[attr-defined]
    if count != TOKENS:
        raise RuntimeError(f"found an answer of {count} tokens, expected {TOKENS}: a fixed number is compared")
    return ask


def tiny(report: Report, folder: Path, threads: Sequence[int], seconds: float, precisions: Sequence[str]) -> None:
    """Whole queries and drafts on tiny, at every number of threads."""
    subject = Tiny(folder / "tiny", precisions)
    for count in threads:
        torch.set_num_threads(count)
        told = f"tiny, {_threads(count)}"
        found = _compare(f"{told}: query", subject.queries(count), seconds)
        report.add(found)
        speedup = found.speedup(f"{told}: query: int8-row").value
        report.goal(
            f"{told}: whole query of {TOKENS} tokens, int8-row over eager fp32", speedup, ">=", GOAL_QUERY, unit="x"
        )
        for precision in precisions:
            works, passes = subject.reasoning(precision, count)
            found = _compare(f"{told}: reasoning {precision}", works, seconds / 2)
            report.add(found)
            for name, number in passes.items():
                report.figure(f"{told}: reasoning {precision}: {name}: passes", number, "")
            if precision == "int8":
                right = f"{told}: reasoning int8: right draft"
                report.goal(f"{right}: language passes", passes["right draft"], "<=", GOAL_PASSES)
                report.goal(f"{right}: over plain", found.speedup(right).value, ">=", GOAL_REASONING, unit="x")


def memory(report: Report, folder: Path, threads: int, *, tiny_only: bool) -> None:
    """What a process without torch holds, for every precision; digests read all of a bundle, so this takes its time."""
    every = tuple(PRECISIONS)
    write_subject(folder / "tiny", PRESETS["tiny"][0], "tiny", every)
    _resident(report, "tiny", folder / "tiny", every, threads)
    if not tiny_only:
        write_subject(folder / "whole", shortened(*DEPTHS["whole"]), GEOMETRY, every)
        _resident(report, "2 layers of real size", folder / "whole", every, threads)


# ------------------------------------------------------------------------------------------------------- real sizes


def stages(
    subjects: dict[str, Subject], chosen: Sequence[str], count: int, seconds: float, least: int
) -> Iterator[tuple[str, Comparison]]:
    """Each stage, every subject and candidate of it in the same rounds; `names` are `subject: candidate`."""
    works: dict[str, dict[str, Work]] = {}
    read = {pages: buffer(READ_BYTES, huge=huge) for pages, huge in (("4 KiB pages", False), ("2 MiB pages", True))}
    for size, subject in subjects.items():
        for name, model in subject.models.items():
            works[f"{size}: {name}"] = eager_stages(model)
        for name, bundle in subject.bundles.items():
            works[f"{size}: {name}"] = bundle_stages(bundle, count)
    for stage in chosen:
        which: Works = {name: found[stage] for name, found in works.items()}
        if stage == "decode":
            which |= {f"read, {pages}": streaming_read(words, count) for pages, words in read.items()}
        yield stage, _compare(f"{stage}, {_threads(count)}", which, seconds, least)


@dataclass(frozen=True)
class Price:
    """Seconds of a stage: of the smaller model, and of each layer more."""

    base: float
    layer: float

    def of(self, more: int) -> float:
        """Seconds with `more` layers than the smaller model has."""
        return self.base + more * self.layer


def price(found: Comparison, prefix: str, candidate: str, layers: int) -> Price:
    """What a stage costs, from the smaller model and the larger one with `layers` more."""
    small, large = (found.samples[f"{prefix}: {size}: {candidate}"] for size in ("half", "whole"))
    return Price(float(np.median(small.by_round())), difference(large, over=small).value / layers)


def real(
    report: Report,
    folder: Path,
    threads: Sequence[int],
    seconds: float,
    least: int,
    without: Sequence[str],
    precisions: Sequence[str],
) -> None:
    """Layers of real size, extrapolated to the whole policy."""
    depths = DEPTHS
    for size, (layers, blocks, head) in depths.items():
        write_subject(folder / size, shortened(layers, blocks, head), GEOMETRY, precisions)
    chosen = [stage for stage in STAGES if stage not in without]
    subjects = {size: open_subject(folder / size, precisions) for size in depths}
    for count in threads:
        torch.set_num_threads(count)
        prices: dict[str, dict[str, Price]] = {}
        read: dict[str, float] = {}
        for stage, found in stages(subjects, chosen, count, seconds, least):
            report.add(found)
            index = 1 if stage == "vision" else 2 if stage in ("condition", "denoise") else 0
            more = depths["whole"][index] - depths["half"][index]
            names = ("eager fp32", "eager bf16", *precisions)
            prefix = f"{stage}, {_threads(count)}"
            prices[stage] = {name: price(found, prefix, name, more) for name in names}
            if stage == "decode":
                read = {
                    pages: READ_BYTES / float(np.median(found.samples[f"{prefix}: read, {pages}"].values))
                    for pages in ("4 KiB pages", "2 MiB pages")
                }
        _extrapolated(report, prices, count)
        _shares(report, prices, read, count)
        gc.collect()
    report.note(
        "Extrapolated to 28 decoder layers, 32 vision blocks and 32 blocks of the head: the smaller model (1, 1, 2) "
        "and the missing layers at the price of one: the median over rounds of the difference between two sizes."
    )


def _extrapolated(report: Report, prices: dict[str, dict[str, Price]], count: int) -> None:
    spec = PRESETS[GEOMETRY][0]
    assert spec.head is not None
    told = _threads(count)
    depth = {"vision": spec.vision.depth - 1, "condition": spec.head.depth - 2, "denoise": spec.head.depth - 2}
    names = list(next(iter(prices.values())))
    whole = {
        stage: {name: found.of(depth.get(stage, spec.language.layers - 1)) for name, found in by_name.items()}
        for stage, by_name in prices.items()
    }
    for stage in whole:
        for name in names:
            report.figure(f"{stage}, {told}: {name}: one layer", prices[stage][name].layer, "s")
    steps = spec.sampler.steps
    whole["head"] = {name: whole["condition"][name] + steps * whole["denoise"][name] for name in names}
    for stage, by_name in whole.items():
        for name in names:
            report.figure(f"{stage}, {told}: {name}: extrapolated", by_name[name], "s")
        for name in names[1:]:
            faster = by_name["eager fp32"] / by_name[name]
            report.figure(f"{stage}, {told}: {name}: extrapolated, times as fast as eager fp32", faster, "x")
    query = {
        name: whole["vision"][name]
        + whole[f"prefill {BEHIND}"][name]
        + (TOKENS - 1) * whole["decode"][name]
        + whole["head"][name]
        for name in names
    }
    for name, value in query.items():
        report.figure(f"query of {TOKENS} tokens, {told}: {name}: extrapolated", value, "s")
    for name in names[1:]:
        faster = query["eager fp32"] / query[name]
        told_query = f"query of {TOKENS} tokens, {told}: {name}: extrapolated, times as fast as eager fp32"
        report.figure(told_query, faster, "x")
    if (longest := f"prefill {PREFILLS[-1]}") in whole:
        # A draft that is right is verified within the prefill: prompt and draft have fewer rows than that.
        for name in names:
            drafted = whole["vision"][name] + whole[longest][name] + whole["head"][name]
            report.figure(f"query with a right draft, {told}: {name}: extrapolated, at most", drafted, "s")
    # Eager makes modulations within each step, the bundle makes them before all steps: only all of the head compares.
    compared = [stage for stage in whole if stage not in ("condition", "denoise")]
    for name in (name for name in ("int8", "int8-row") if name in names):
        report.goal(
            f"real sizes, {told}: query of {TOKENS} tokens extrapolated, {name} over eager fp32",
            query["eager fp32"] / query[name],
            ">=",
            GOAL_QUERY,
            unit="x",
        )
        faster_by_stage = {stage: whole[stage]["eager fp32"] / whole[stage][name] for stage in compared}
        slowest = min(faster_by_stage, key=lambda stage: faster_by_stage[stage])
        report.goal(
            f"real sizes, {told}: slowest stage of {name} over eager fp32 ({slowest})",
            faster_by_stage[slowest],
            ">=",
            1.0,
            unit="x",
        )


def _shares(report: Report, prices: dict[str, dict[str, Price]], read: dict[str, float], count: int) -> None:
    """What one decoder layer takes of the machine: of read bandwidth in decode, of the GEMM peak in prefill.

    read: bytes per second by pages. One row visits k experts and the attention's maps; bytes are codes and scales.
    """
    language, told = PRESETS[GEOMETRY][0].language, _threads(count)
    wide, narrow = language.heads * language.head_dim, language.kv_heads * language.head_dim
    maps = 3 * language.routed_width * language.experts.top_k + 2 * (wide + narrow)
    weights = language.hidden * maps
    bits_per_weight = {"eager fp32": 32.0, "eager bf16": 16.0, "int8": 8.25, "int8-row": 8.0, "int4": 4.25}
    for name, bits in ((name, bits) for name, bits in bits_per_weight.items() if name in prices["decode"]):
        rate = weights * bits / 8 / prices["decode"][name].layer
        report.figure(f"decode, {told}: {name}: weights read by one layer", rate / 1e9, "GB/s")
        for pages, most in read.items():
            report.figure(f"decode, {told}: {name}: one layer's share of read bandwidth, {pages}", rate / most, "x")
    peak = gemm_peak(count, seconds=1.0)
    for rows in (rows for rows in PREFILLS if f"prefill {rows}" in prices):
        for name, found in prices[f"prefill {rows}"].items():
            share = 2.0 * rows * weights / found.layer / peak
            report.figure(f"prefill {rows}, {told}: {name}: one layer's share of the float32 GEMM peak", share, "x")


def _resident(report: Report, told: str, folder: Path, precisions: Sequence[str], threads: int) -> None:
    for precision in precisions:
        found = resident.measure(folder / precision, threads)
        name = f"{told}, {precision}, without torch"
        with open_bundle(folder / precision, verify=False) as bundle:
            report.figure(f"{name}: bundle", bundle.size, "B")
        report.figure(f"{name}: resident after one query", found.rss, "B")
        report.figure(f"{name}: of it anonymous", found.anonymous, "B")
        report.figure(f"{name}: of it before the bundle was opened", found.before, "B")
        report.figure(f"{name}: digests checked", found.verify_s, "s")
        report.figure(f"{name}: engines loaded", found.load_s, "s")


# ------------------------------------------------------------------------------------------------------- the report


def _compare(what: str, works: Works, seconds: float, least: int = 7) -> Comparison:
    with torch.no_grad():
        return compare({f"{what}: {name}": work for name, work in works.items()}, seconds=seconds, least_rounds=least)


def _threads(count: int) -> str:
    return f"{count} thread{'s'[: count > 1]}"


def add_arguments(parser: ArgumentParser) -> None:
    """Budget, threads, parts, and where to keep what takes minutes to make."""
    parser.add_argument("--seconds", type=float, help="for each candidate of a comparison; default: 2, quick: 0.5")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=7, help="at least, of layers of real size; default: 7")
    parser.add_argument("--without", nargs="+", choices=OPTIONAL, default=[], help="of layers of real size")
    parser.add_argument("--precisions", nargs="+", choices=QUANTIZED, default=QUANTIZED, help="of layers of real size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; quick: tiny and its memory")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep checkpoints and bundles for the next run")


def run(options: Namespace) -> Report:
    """Tiny, then real sizes unless `--quick`."""
    seconds = options.seconds or (0.5 if options.quick else 2.0)
    parts = options.parts or (("tiny", "memory") if options.quick else PARTS)
    report = Report(title="A bundle's stages beside PyTorch eager on the same checkpoint")
    with _folder(options.work) as folder:
        if "tiny" in parts:
            tiny(report, folder, options.threads, seconds, tuple(PRECISIONS))
        if "memory" in parts:
            memory(report, folder, options.threads[0], tiny_only=options.quick)
        if "real" in parts:
            real(report, folder, options.threads, seconds, options.rounds, options.without, options.precisions)
    if "real" not in parts:
        report.note("Layers of real size were left out: their goals are not among those below.")
    return report


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
