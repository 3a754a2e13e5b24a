"""Which layer is it? Each part of each stage by itself, fed what the reference feeds it.

A stage graph is cut, in memory, along its residual stream: every value between two blocks becomes an input that takes
the reference's own numbers, and what each attention, MLP or mixture of experts adds becomes an output. One run then
judges all parts, and an error in one of them reaches no other. The bundle is read and never written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.backbone import mrope_positions
from chatvla_edge.export.model.experts import Router
from chatvla_edge.export.model.fusion import prompt_mean, reasoning_mean
from chatvla_edge.export.model.policy import ChatVLA2
from chatvla_edge.export.probes import Arrays, modulations, speak
from chatvla_edge.runtime.bundle import Contents, Stage
from chatvla_edge.runtime.gates import LIMITS, Part, compared

Array = NDArray[np.generic]
Say = Callable[[str], None]

_Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Inputs by name -> outputs by name."""

LAYER_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"})
# Nodes between a block's first linear map and the norm before it: modulation, casts, rounding of activations.
REACH = 8


@torch.no_grad()
def bisect(
    root: Path,
    contents: Contents,
    model: ChatVLA2,
    observed: Arrays,
    threads: int = 1,
    say: Say = lambda _: None,
) -> list[Part]:
    """Every part of every stage beside the reference, in the order of a query.

    root: the bundle's directory, its digests checked; model: the reference over the weights that the bundle is meant
    to hold (`probes.dequantized`); observed: see `probes.observation`, and `draft`, the text where it is known. Raises
    ValueError for a stage that is not laid out as this version's export does it, and for a target other than cpu.
    """
    if contents.target.name != "cpu":
        raise ValueError(
            f"{root}: found a bundle for {contents.target.name}, expected one for cpu, where stages are taken apart: "
            "export the checkpoint for cpu and bisect that"
        )
    longest = contents.prompt.max_reasoning_tokens
    reference = _Reference(model, [(camera.name, camera.grid) for camera in contents.cameras], observed, longest)
    parts: list[Part] = []
    for stage in contents.stages.vision:
        say("vision")
        parts += _vision(_Taken(root, stage, threads), reference, stage.grid)
    for name, judge, taken in (
        ("language", _language, contents.stages.language),
        ("condition", _condition, contents.stages.condition),
        ("denoise", _denoise, contents.stages.denoise),
    ):
        say(name)
        parts += judge(_Taken(root, taken, threads), reference)
    return parts


# ----------------------------------------------------------------------------------------------------- the reference


class _Heard:
    """What modules take and give while the context is open, call by call."""

    def __init__(self, taken: Mapping[str, nn.Module], given: Mapping[str, nn.Module]) -> None:
        self.values: dict[str, list[Tensor]] = {name: [] for name in (*taken, *given)}
        self._handles = [
            *(m.register_forward_pre_hook(self._hear(name), with_kwargs=True) for name, m in taken.items()),
            *(m.register_forward_hook(self._answer(name)) for name, m in given.items()),
        ]

    def _hear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            self.values[name].append(inputs[0] if inputs else named["hidden_states"])

        return hook

    def _answer(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output
            assert isinstance(value, Tensor)
            self.values[name].append(value)

        return hook

    def __enter__(self) -> "_Heard":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def flat(self, name: str, call: int = 0) -> NDArray[np.float32]:
        """[rows, width] of one call."""
        value = self.values[name][call]
        return value.reshape(-1, value.shape[-1]).float().numpy()


@dataclass
class _Blocks:
    """The residual stream of one run: `stream[0]`, then what it is behind each branch; `branches` between them."""

    stream: list[NDArray[np.float32]] = field(default_factory=list)
    branches: list[NDArray[np.float32]] = field(default_factory=list)


class _Reference:
    """The reference's numbers for one observation, as far as they are asked for."""

    def __init__(
        self, model: ChatVLA2, cameras: Sequence[tuple[str, tuple[int, int]]], observed: Arrays, max_tokens: int
    ) -> None:
        self.model, self.cameras, self.observed = model, cameras, observed
        grids = [grid for _, grid in cameras]
        # The published processor's patches hold each pixel twice, once per temporal slice.
        vision = model.spec.vision
        doubled = [
            np.repeat(
                observed[f"patches.{name}"].reshape(-1, vision.channels, 1, vision.patch**2),
                vision.temporal_patch,
                axis=2,
            ).reshape(-1, vision.patch_values)
            for name, _ in cameras
        ]
        visual = model.backbone.visual
        with _Heard(
            {f"norm{j}.{i}": getattr(block, f"norm{j}") for i, block in enumerate(visual.blocks) for j in (1, 2)}
            | {"last": visual.merger.ln_q},
            {f"{part}.{i}": getattr(block, part) for i, block in enumerate(visual.blocks) for part in ("attn", "mlp")},
        ) as self.seen:
            self.image_tokens = model.backbone.images(torch.from_numpy(np.concatenate(doubled)), grids)
        self.ids = torch.from_numpy(observed["prompt_ids"])
        draft = observed["draft"].tolist() if "draft" in observed else []
        self.generation, _ = speak(model, self.ids, self.image_tokens, grids, max_tokens, draft)
        self.grids = grids


def _blocks(heard: _Heard, depth: int, names: tuple[str, str, str, str], call: int = 0) -> _Blocks:
    """Collect the stream of `depth` blocks; names: of both norms' inputs and of both branches."""
    first, second, attention, mlp = names
    out = _Blocks()
    for i in range(depth):
        out.stream += [heard.flat(f"{first}.{i}", call), heard.flat(f"{second}.{i}", call)]
        out.branches += [heard.flat(f"{attention}.{i}", call), heard.flat(f"{mlp}.{i}", call)]
    out.stream.append(heard.flat("last", call))
    return out


# --------------------------------------------------------------------------------------------------- graphs, cut open


class _Taken:
    """A stage of the bundle, taken apart in memory."""

    def __init__(self, root: Path, stage: Stage, threads: int) -> None:
        self.file = root / stage.file
        self.limit = LIMITS[stage.precision].part
        self.threads = threads
        self.model = onnx.load(str(self.file), load_external_data=False)
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.made = {value: node for node in self.nodes for value in node.output}
        self.outputs = [value.name for value in graph.output]
        self.taps: list[str] = []

    def cut(self, anchors: Sequence[str], outputs: Sequence[str] = ()) -> None:
        """Cut before the norm in front of each weight: given.0, given.1, ...; taps are the first value, then branches.

        anchors: one per value of the residual stream, in order. outputs: cut behind these, too: given.OUTPUT.
        """
        stream = [self._before_norm(anchor) for anchor in anchors]
        self.taps = [stream[0]]
        for (before, after), anchor in zip(pairwise(stream), anchors[1:], strict=True):
            node = self.made[after]
            branch = [value for value in node.input if value != before]
            if node.op_type != "Add" or len(branch) != 1:
                raise self._strange(f"a residual sum of {before} before {anchor}")
            self.taps.append(branch[0])
        places = {value: f"given.{index}" for index, value in enumerate(stream)}
        places |= {value: f"given.{value}" for value in outputs}
        for node in self.nodes:
            for index, value in enumerate(node.input):
                if value in places:
                    node.input[index] = places[value]
        for name in places.values():
            self.model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["given", None]))
        self._show(self.taps)

    def tap(self, maps: Sequence[str]) -> None:
        """Show what these linear maps give, bias included."""
        self.taps = []
        for name in maps:
            value = self._reader(f"{name}.weight").output[0]
            # By the bias alone: between an integer product and its bias stand the scales of the rows.
            added = [node for node in self.nodes if node.op_type == "Add" and f"{name}.bias" in node.input]
            self.taps.append(added[0].output[0] if added else value)
        self._show(self.taps)

    def _show(self, values: Sequence[str]) -> None:
        there = {*self.outputs}
        for value in values:
            if value not in there:
                there.add(value)
                self.model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))

    def open(self) -> _Run:
        """Load what is left; inputs by name -> outputs and taps by name."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The graph comes as bytes, its weights lie where they always did.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.file.parent.resolve())
        )
        session = onnxruntime.InferenceSession(
            self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}

        def run(feed: Mapping[str, Array]) -> dict[str, Array]:
            # A value that only a cut read is no input any more.
            given = {name: np.ascontiguousarray(value) for name, value in feed.items() if name in wanted}
            return dict(zip(names, session.run(None, given), strict=True))

        return run

    def _reader(self, weight: str) -> onnx.NodeProto:
        """The node that reads an initializer, or a packed form of it: `WEIGHT.codes`."""
        for node in self.nodes:
            if any(value == weight or value.startswith(f"{weight}.") for value in node.input):
                return node
        raise self._strange(f"a node that reads {weight}")

    def _before_norm(self, weight: str) -> str:
        """The value that the norm in front of a weight (or the norm that has this weight) is taken of."""
        node = self._reader(weight)
        for _ in range(REACH):
            if node.op_type in NORMS or node.op_type == "Div":
                return str(node.input[0])
            # Data come first everywhere but in a product, where the weight may.
            value = next(value for value in node.input if value != weight)
            if value not in self.made:
                break
            node = self.made[value]
        raise self._strange(f"a norm before {weight}")

    def _strange(self, expected: str) -> ValueError:
        return ValueError(
            f"{self.file.name}: expected {expected}, found none: this stage was not laid out by this version. Export "
            "the checkpoint anew with it, or bisect with the version that exported the bundle"
        )


def _given(blocks: _Blocks) -> dict[str, Array]:
    return {f"given.{index}": value for index, value in enumerate(blocks.stream)}


# --------------------------------------------------------------------------------------------------------- the stages


def _vision(taken: _Taken, reference: _Reference, grid: tuple[int, int]) -> Iterator[Part]:
    model, name = reference.model, f"vision[{grid[0]}x{grid[1]}]"
    depth = model.spec.vision.depth
    blocks = "backbone.visual.blocks"
    anchors = [f"{blocks}.{i}.norm{j}.weight" for i in range(depth) for j in (1, 2)]
    taken.cut([*anchors, "backbone.visual.merger.ln_q.weight"])
    # Rows of the cameras that have this grid; the reference saw all cameras in a row.
    rows, start = [], 0
    for camera, other in reference.cameras:
        count = other[0] * other[1]
        if other == grid:
            rows.append((camera, slice(start, start + count)))
        start += count
    merged = model.spec.vision.merge**2
    picked = np.concatenate([np.arange(each.start, each.stop) for _, each in rows])
    whole = _blocks(reference.seen, depth, ("norm1", "norm2", "attn", "mlp"))
    mine = _Blocks([value[picked] for value in whole.stream], [value[picked] for value in whole.branches])
    patches = np.stack([reference.observed[f"patches.{camera}"] for camera, _ in rows])
    found = taken.open()({"patches": patches, **_given(mine)})

    yield compared((name, "", "patch embedding"), found[taken.taps[0]], mine.stream[0], taken.limit)
    for index, (tap, expected) in enumerate(zip(taken.taps[1:], mine.branches, strict=True)):
        where = (name, f"block {index // 2}", ("attention", "mlp")[index % 2])
        yield compared(where, found[tap], expected, taken.limit)
    tokens = reference.image_tokens.numpy()[picked[::merged] // merged]
    yield compared((name, "", "merger"), found["image_tokens"].reshape(tokens.shape), tokens, taken.limit)


def _language(taken: _Taken, reference: _Reference) -> Iterator[Part]:
    backbone, spec = reference.model.backbone, reference.model.spec
    model, language = spec.language, backbone.language
    layers = list(enumerate(language.layers))
    fed = torch.tensor(reference.generation.token_ids[:-1], dtype=torch.int64)
    positions, following = mrope_positions(reference.ids, reference.grids, spec.tokens.image_pad, spec.vision.merge)
    positions = torch.cat([positions, (following + torch.arange(len(fed))).expand(3, -1)], dim=1)
    embedded = torch.cat([backbone.embed(reference.ids, reference.image_tokens), backbone.embed(fed)])
    routers = [(i, module) for i, layer in layers for module in layer.modules() if isinstance(module, Router)]
    ids: dict[int, Array] = {}
    handles = [
        router.register_forward_hook(lambda _m, _i, out, i=i: ids.__setitem__(i, out[1].numpy()))
        for i, router in routers
    ]
    with _Heard(
        {f"{norm}.{i}": getattr(layer, norm) for i, layer in layers for norm in LAYER_NORMS} | {"last": language.norm},
        {f"{part}.{i}": getattr(layer, part) for i, layer in layers for part in ("self_attn", "mlp")},
    ) as heard:
        hidden = backbone.hidden(embedded, positions)
    for handle in handles:
        handle.remove()
    logits = backbone.logits(hidden)
    blocks = _blocks(heard, model.layers, (*LAYER_NORMS, "self_attn", "mlp"))

    name = "backbone.language"
    norms = [f"{name}.layers.{i}.{norm}.weight" for i, _ in layers for norm in LAYER_NORMS]
    taken.cut([*norms, f"{name}.norm.weight"], ["hidden"])
    tokens = np.concatenate([reference.ids.numpy(), fed.numpy()])
    run = taken.open()
    given = {**_given(blocks), "given.hidden": hidden.numpy()}
    found = _in_two_passes(taken, run, reference, tokens, positions.numpy(), given)
    aimed = _at_each_expert(taken, run, reference, layers)

    yield compared(("language", "", "embedding"), found[taken.taps[0]], blocks.stream[0], taken.limit)
    words = "mlp" if model.experts.kind == "dense" else "experts"
    for index, (tap, expected) in enumerate(zip(taken.taps[1:], blocks.branches, strict=True)):
        layer, here = index // 2, found[tap]
        routing = None
        if index % 2 and layer in aimed:
            rows = aimed[layer]
            here, expected = np.concatenate([here, rows.found]), np.concatenate([expected, rows.expected])
            routing = (
                np.concatenate([found[f"routing_{layer}"], rows.routing]),
                np.concatenate([ids[layer], rows.ids]),
            )
        where = ("language", f"layer {layer}", (("attention", words)[index % 2]))
        yield compared(where, here, expected, taken.limit, routing)
    yield compared(("language", "", "final norm"), found["hidden"], hidden.numpy(), taken.limit)
    # The reference's logit of the token that was named: rows of the matrix in another order give the same best two.
    named = logits.gather(1, torch.from_numpy(found["token"])[:, None])
    best = torch.cat([named, logits.topk(2).values[:, 1:]], dim=1).numpy()
    yield compared(("language", "", "output matrix"), found["top2_logits"], best, taken.limit)


@dataclass(frozen=True)
class _Aimed:
    """Rows of one layer that visit every expert: what the experts add, and whom the rows visit, there and here."""

    found: Array
    routing: Array
    expected: Array
    ids: Array


def _at_each_expert(
    taken: _Taken, run: _Run, reference: _Reference, layers: Sequence[tuple[int, nn.Module]]
) -> dict[int, _Aimed]:
    """A pass with a row for every expert of every layer: an observation may leave an expert without a visitor.

    A row that points, behind the norm, where the expert's own row of the router does has that expert's largest logit.
    """
    spec = reference.model.spec
    count = spec.language.experts.routed
    if not count:
        return {}
    rows = count + count % 2
    stream: dict[str, Array] = {}
    expected: dict[int, tuple[Array, Array]] = {}
    for index, layer in layers:
        norm, mlp = layer.get_submodule("post_attention_layernorm"), layer.get_submodule("mlp")
        router = mlp.get_submodule("router")
        aim = router.get_parameter("weight").float() / norm.get_parameter("weight").float()
        aim = (aim / aim.square().mean(-1, keepdim=True).sqrt())[torch.arange(rows) % count]
        normal = norm(aim)
        expected[index] = mlp(normal).numpy(), router(normal)[1].numpy()
        stream[f"given.{2 * index}"] = stream[f"given.{2 * index + 1}"] = aim.numpy()
    stream[f"given.{2 * len(layers)}"] = stream["given.hidden"] = stream["given.0"]
    nothing = np.zeros(0, np.int64)
    found = run(
        {
            **_pass(np.zeros(rows, np.int64), np.tile(np.arange(rows), (3, 1)), 0),
            "image_tokens": np.zeros((0, spec.language.hidden), np.float32),
            "image_rows": nothing,
            **{f"past_{name}": value for name, value in _cache(taken, reference).items()},
            **stream,
        }
    )
    return {
        index: _Aimed(found[taken.taps[2 * index + 2]], found[f"routing_{index}"], *there)
        for index, there in expected.items()
    }


def _pass(tokens: Array, positions: Array, length: int) -> dict[str, Array]:
    scalars = {"length": length, "first_row": 0, "sum_stop": 0}
    return {
        "token_ids": tokens,
        "positions": positions,
        **{name: np.array([value], np.int64) for name, value in scalars.items()},
    }


def _cache(taken: _Taken, reference: _Reference) -> dict[str, Array]:
    shape = next(
        [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in taken.model.graph.input
        if value.name == "past_key_0"
    )
    return {
        f"{kind}_{i}": np.zeros(shape, np.float32)
        for i in range(reference.model.spec.language.layers)
        for kind in ("key", "value")
    }


def _in_two_passes(
    taken: _Taken, run: _Run, reference: _Reference, tokens: Array, positions: Array, given: Mapping[str, Array]
) -> dict[str, Array]:
    """Half of the rows, then the rest behind them: the second half goes through the cache. Outputs of all rows."""
    count = len(tokens)
    half = count // 4 * 2
    cache = _cache(taken, reference)
    rows = np.flatnonzero(tokens == reference.model.spec.tokens.image_pad)
    image_tokens = reference.image_tokens.numpy()
    outputs: dict[str, list[Array]] = {}
    for start, stop in ((0, half), (half, count)):
        # An even number of rows, as the runtime feeds them.
        index = np.append(np.arange(start, stop), [stop - 1] * ((stop - start) % 2)).astype(np.int64)
        inside = (rows >= start) & (rows < stop)
        found = run(
            {
                **_pass(tokens[index], positions[:, index], start),
                "image_tokens": image_tokens[inside],
                "image_rows": rows[inside] - start,
                **{f"past_{name}": value for name, value in cache.items()},
                **{name: value[index] for name, value in given.items()},
            }
        )
        cache = {name: found[f"present_{name}"] for name in cache}
        for name, value in found.items():
            if not name.startswith("present_") and name != "hidden_sum":
                outputs.setdefault(name, []).append(value[: stop - start])
    return {name: np.concatenate(values) for name, values in outputs.items()}


def _means(reference: _Reference) -> tuple[Tensor, Tensor]:
    generation = reference.generation
    return prompt_mean(generation.prompt), reasoning_mean(generation.prompt, generation.decoded)


def _conditions(reference: _Reference) -> tuple[Tensor, Tensor]:
    observed, reasoned = reference.model.fusion(*_means(reference))
    state = torch.from_numpy(reference.observed["normalized_state"])[None]
    out: tuple[Tensor, Tensor] = reference.model.head.condition(observed[None], reasoned[None], state)
    return out


def _condition(taken: _Taken, reference: _Reference) -> Iterator[Part]:
    """In the order of the arithmetic, not cut: the first that diverges is where to look."""
    model = reference.model
    fusion, head, spec = model.fusion, model.head, model.head.head
    maps = {
        "fusion.input_projector.2": ("input projector", fusion.input_projector),
        "fusion.reasoning_projector.2": ("reasoning projector", fusion.reasoning_projector),
        "head.cond_obs_emb": ("observation's condition", head.cond_obs_emb),
    }
    if spec.reasoning is not None:
        maps["head.cond_reasoning_emb"] = ("reasoning's condition", head.cond_reasoning_emb)
    taken.tap(list(maps))
    with _Heard({}, {name: module for name, (_, module) in maps.items()}) as heard:
        conditions = _conditions(reference)
    first, second = _means(reference)
    state = reference.observed["normalized_state"]
    found = taken.open()(
        {"prompt_mean": first[None].numpy(), "reasoning_mean": second[None].numpy(), "state": state[None]}
    )
    for tap, (name, (words, _)) in zip(taken.taps, maps.items(), strict=True):
        expected = heard.flat(name)
        yield compared(("condition", "", words), found[tap].reshape(expected.shape), expected, taken.limit)
    expected = modulations(model, conditions)
    width = 6 * spec.width
    for index in range(spec.depth + 1):
        columns = slice(index * width, (index + 1) * width)
        place = f"block {index}" if index < spec.depth else "final layer"
        yield compared(
            ("condition", place, "modulations"), found["modulations"][:, columns], expected[:, columns], taken.limit
        )


def _denoise(taken: _Taken, reference: _Reference) -> Iterator[Part]:
    """Each sampler step by itself; a part's figures are those of its worst step."""
    model = reference.model
    head, depth = model.head, model.head.head.depth
    conditions = _conditions(reference)
    rows = modulations(model, conditions)
    steps = ddim.steps(model.spec.sampler)
    noise = torch.from_numpy(reference.observed["noise"])[None]
    with _Heard(
        {"x": head} | {f"in.{i}": block for i, block in enumerate(head.blocks)} | {"last": head.final_layer},
        {
            f"{part}.{i}": getattr(block, part)
            for i, block in enumerate(head.blocks)
            for part in ("attn", "mlp", "adaLN_modulation")
        },
    ) as heard:
        chunk = head.sample(noise, conditions, model.spec.sampler)
    anchors = [f"head.blocks.{i}.{name}.weight" for i in range(depth) for name in ("attn.qkv", "mlp.fc1")]
    taken.cut([*anchors, "head.final_layer.linear.weight"])
    run = taken.open()
    after = [*(heard.flat("x", call) for call in range(1, len(steps))), chunk[0].numpy()]
    worst: dict[tuple[str, str, str], Part] = {}
    for call, (at, x_next) in enumerate(zip(steps, after, strict=True)):
        blocks = _gated(heard, depth, call)
        x = heard.flat("x", call)
        feed = {"x": x, "modulation": rows[call : call + 1], "coefficients": np.array(at.coefficients, np.float32)}
        nothing = {"prefix": np.zeros_like(x), "mask": np.zeros(len(x), np.float32)}
        found = run({**feed, **nothing, **_given(blocks)})
        parts = [compared(("denoise", "", "action embedding"), found[taken.taps[0]], blocks.stream[0], taken.limit)]
        for index, (tap, expected) in enumerate(zip(taken.taps[1:], blocks.branches, strict=True)):
            where = ("denoise", f"block {index // 2}", ("attention", "mlp")[index % 2])
            parts.append(compared(where, found[tap], expected, taken.limit))
        parts.append(compared(("denoise", "", "final layer and step"), found["x_next"], x_next, taken.limit))
        for part in parts:
            key = (part.stage, part.place, part.what)
            if key not in worst or not part.rms <= worst[key].rms:
                worst[key] = part
    yield from worst.values()


def _gated(heard: _Heard, depth: int, call: int) -> _Blocks:
    """The stream of the head's blocks, whose branches come in through gates."""
    out = _Blocks()
    for i in range(depth):
        gates = heard.values[f"adaLN_modulation.{i}"][call].chunk(6, dim=-1)
        before = heard.flat(f"in.{i}", call)
        attended = gates[2].numpy() * heard.flat(f"attn.{i}", call)
        out.stream += [before, before + attended]
        out.branches += [attended, gates[5].numpy() * heard.flat(f"mlp.{i}", call)]
    out.stream.append(heard.flat("last", call))
    return out
