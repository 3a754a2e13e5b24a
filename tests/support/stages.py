"""Stage graphs in ONNX Runtime, and the reference behind the same inputs and outputs."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from transformers import DynamicCache

from chatvla_edge.export.lower.onnxruntime import Target, lower
from chatvla_edge.export.model import ddim
from chatvla_edge.export.model.backbone import mrope_positions
from chatvla_edge.export.model.ddim import Committed
from chatvla_edge.export.model.experts import Router
from chatvla_edge.export.stages.denoise import condition, denoise
from chatvla_edge.export.stages.graph import Graph
from chatvla_edge.export.stages.language import language
from chatvla_edge.export.stages.vision import vision
from chatvla_edge.export.stages.weights import Parameters

CAPACITY = 64
GRID = (4, 6)
STAGES = {
    "vision": lambda spec, weights: vision(spec, weights, GRID),
    "language": language,
    "condition": condition,
    "denoise": denoise,
}


def parameters(model) -> Parameters:
    state = model.state_dict()
    return Parameters(lambda name: state[name])


def lowered(graph: Graph, spec, precision: str = "fp32", capacity: int = CAPACITY) -> Graph:
    return lower(graph, spec, Target(precision, capacity))


def save(graph: Graph, folder: Path, name: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or graph.name}.onnx"
    graph.save(path)
    return path


def session(path: Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def relative(found, expected) -> float:
    """Largest difference over the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@dataclass
class Pass:
    """Inputs of one pass of the language stage; rows that are image tokens come with them."""

    ids: np.ndarray
    positions: np.ndarray
    image_tokens: np.ndarray | None = None
    image_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    first_row: int = 0
    sum_stop: int = 0

    def rows(self, start: int, stop: int, **changes) -> "Pass":
        """The same prompt, rows start .. stop - 1 of it."""
        inside = (self.image_rows >= start) & (self.image_rows < stop)
        tokens = None if self.image_tokens is None else self.image_tokens[inside]
        rows = self.image_rows[inside] - start
        return Pass(self.ids[start:stop], self.positions[:, start:stop], tokens, rows, **changes)

    def feed(self, length: int, hidden: int) -> dict[str, np.ndarray]:
        tokens = np.zeros((0, hidden), np.float32) if self.image_tokens is None else self.image_tokens
        return {
            "token_ids": np.ascontiguousarray(self.ids, np.int64),
            "image_tokens": np.ascontiguousarray(tokens, np.float32),
            "image_rows": np.ascontiguousarray(self.image_rows, np.int64),
            "positions": np.ascontiguousarray(self.positions, np.int64),
            "length": np.array([length], np.int64),
            "first_row": np.array([self.first_row], np.int64),
            "sum_stop": np.array([self.sum_stop], np.int64),
        }


def prompt(spec, rows: int, grids=(), seed: int = 0) -> Pass:
    """Random text of `rows` rows with images of `grids` after its second row."""
    rng = np.random.default_rng(seed)
    pad, merge = spec.tokens.image_pad, spec.vision.merge
    images = [pad] * sum(a * b // merge**2 for a, b in grids)
    text = rng.integers(0, min(spec.language.vocab, 300), rows - len(images))
    ids = np.concatenate([text[:2], images, text[2:]]).astype(np.int64)
    positions, _ = mrope_positions(torch.from_numpy(ids), grids, pad, merge)
    tokens = rng.normal(0, 0.5, (len(images), spec.language.hidden)).astype(np.float32) if images else None
    return Pass(ids, positions.numpy(), tokens, np.flatnonzero(ids == pad), sum_stop=rows)


class Stage:
    """The language stage in ONNX Runtime; the cache is written in place when `in_place`, else copied back."""

    def __init__(self, path: Path, spec, *, capacity: int = CAPACITY, in_place: bool = False, threads: int = 1):
        language = spec.language
        self.session, self.hidden, self.in_place = session(path, threads), language.hidden, in_place
        shape = (1, language.kv_heads, capacity, language.head_dim)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cache = {
            f"{kind}_{i}": np.zeros(shape, np.float32) for i in range(language.layers) for kind in ("key", "value")
        }
        self.length = 0

    def restart(self, garbage: float = 0.0) -> None:
        self.length = 0
        for array in self.cache.values():
            array[:] = garbage

    def __call__(self, inputs: Pass) -> dict[str, np.ndarray]:
        feed = inputs.feed(self.length, self.hidden)
        found = self._bound(feed) if self.in_place else self._copied(feed)
        self.length += len(inputs.ids)
        return found

    def _copied(self, feed):
        past = {f"past_{name}": array for name, array in self.cache.items()}
        found = dict(zip(self.outputs, self.session.run(None, feed | past), strict=True))
        for name, array in self.cache.items():
            array[:] = found.pop(f"present_{name}")
        return found

    def _bound(self, feed):
        binding = self.session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in self.cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        plain = [name for name in self.outputs if not name.startswith("present_")]
        for name in plain:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        # Outputs come back in the order in which they were bound: the cache first.
        values = binding.get_outputs()[len(self.cache) :]
        return {name: value.numpy() for name, value in zip(plain, values, strict=True)}

    def rows(self) -> dict[str, np.ndarray]:
        """The cache as far as it is filled."""
        return {name: array[:, :, : self.length].copy() for name, array in self.cache.items()}


class Reference:
    """The reference model behind the interface of `Stage`."""

    def __init__(self, model):
        self.model = model
        self.restart()

    def restart(self) -> None:
        self.past = DynamicCache(config=self.model.backbone.language.config)

    @torch.no_grad()
    def __call__(self, inputs: Pass) -> dict[str, np.ndarray]:
        backbone = self.model.backbone
        embedded = backbone.embed(torch.from_numpy(inputs.ids))
        if inputs.image_tokens is not None:
            embedded[inputs.image_rows] = torch.from_numpy(inputs.image_tokens)
        routing, handles = [], []
        for module in backbone.modules():
            if isinstance(module, Router):
                handles.append(module.register_forward_hook(lambda _m, _i, out: routing.append(out[1].numpy())))
        hidden = backbone.hidden(embedded, torch.from_numpy(inputs.positions), self.past)
        for handle in handles:
            handle.remove()
        logits = backbone.logits(hidden[inputs.first_row :])
        found = {
            "token": logits.argmax(-1).numpy(),
            "top2_logits": logits.topk(2).values.numpy(),
            "hidden": hidden[inputs.first_row :].numpy(),
            "hidden_sum": hidden[: inputs.sum_stop].float().sum(0).numpy(),
        }
        return found | {f"routing_{i}": ids for i, ids in enumerate(routing)}

    def rows(self) -> dict[str, np.ndarray]:
        return {
            f"{kind}_{i}": getattr(layer, f"{kind}s").numpy()
            for i, layer in enumerate(self.past.layers)
            for kind in ("key", "value")
        }


def assert_same_pass(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Integers are identical, everything else agrees to `tolerance`."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == np.int64:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        elif value.any():
            assert relative(found[name], value) <= tolerance, name
        else:
            assert not found[name].any(), name


def halves(patches: np.ndarray) -> np.ndarray:
    """[P, 1176] as the published processor makes them -> [P, 588], one of two equal temporal slices."""
    cut = patches.reshape(len(patches), 3, 2, 14, 14)
    np.testing.assert_array_equal(cut[:, :, 0], cut[:, :, 1])
    return np.ascontiguousarray(cut[:, :, 0].reshape(len(patches), -1))


class Query:
    """A whole query through the four stages, decoded plainly: what a runtime does, without its care for speed.

    `prepare` turns each neutral graph into the one that runs.
    """

    def __init__(self, model, folder: Path, grids, prepare=lambda graph: graph, in_place: bool = False):
        self.spec, self.grids = model.spec, list(grids)
        weights = parameters(model)

        def path(graph: Graph) -> Path:
            return save(prepare(graph), folder)

        self.vision = {grid: session(path(vision(self.spec, weights, grid))) for grid in dict.fromkeys(self.grids)}
        self.language = Stage(path(language(self.spec, weights)), self.spec, in_place=in_place, capacity=96)
        self.condition = session(path(condition(self.spec, weights)))
        self.denoise = session(path(denoise(self.spec, weights)))

    def image_tokens(self, patches: list[np.ndarray]) -> np.ndarray:
        """Frames of one grid go through together; tokens come back in camera order."""
        tokens: dict[int, np.ndarray] = {}
        for grid, stage in self.vision.items():
            cameras = [index for index, other in enumerate(self.grids) if other == grid]
            (out,) = stage.run(None, {"patches": np.stack([halves(patches[index]) for index in cameras])})
            tokens |= dict(zip(cameras, out, strict=True))
        return np.concatenate([tokens[index] for index in range(len(self.grids))])

    def generate(self, ids: np.ndarray, image_tokens: np.ndarray, max_tokens: int):
        """Token ids, mean over the prompt, mean over the reasoning, expert visits."""
        positions, following = mrope_positions(torch.from_numpy(ids), self.grids, self.spec.tokens.image_pad)
        rows = np.flatnonzero(ids == self.spec.tokens.image_pad)
        self.language.restart()
        found = self.language(Pass(ids, positions.numpy(), image_tokens, rows, len(ids) - 1, len(ids)))
        prompt_mean = found["hidden_sum"] / len(ids)
        generated, decoded, passes = [int(found["token"][0])], [], [found]
        while generated[-1] != self.spec.tokens.im_end and len(generated) < max_tokens:
            at = np.full((3, 1), following + len(decoded))
            passes.append(self.language(Pass(np.array(generated[-1:]), at)))
            decoded.append(passes[-1]["hidden"][0])
            generated.append(int(passes[-1]["token"][0]))
        reasoning_mean = np.mean(decoded, axis=0) if decoded else found["hidden"][-1]
        routed = [name for name in found if name.startswith("routing_")]
        experts = self.spec.language.experts.routed
        visits = [
            np.bincount(np.concatenate([each[name].ravel() for each in passes]), minlength=experts) for name in routed
        ]
        return generated, prompt_mean, reasoning_mean, np.array(visits)

    def modulations(self, prompt_mean: np.ndarray, reasoning_mean: np.ndarray, state: np.ndarray) -> np.ndarray:
        feed = {"prompt_mean": prompt_mean[None], "reasoning_mean": reasoning_mean[None], "state": state[None]}
        return self.condition.run(None, {name: value.astype(np.float32) for name, value in feed.items()})[0]

    def sample(self, noise: np.ndarray, modulations: np.ndarray, committed: Committed | None = None) -> np.ndarray:
        head, x = self.spec.head, noise
        prefix, mask = np.zeros((head.horizon, head.action_dim), np.float32), np.zeros(head.horizon, np.float32)
        if committed is not None:
            prefix, mask = committed.prefix.numpy(), committed.mask.numpy()
        for row, at in zip(modulations, ddim.steps(self.spec.sampler), strict=True):
            feed = {"x": x, "modulation": row[None], "coefficients": np.array(at.coefficients, np.float32)}
            (x,) = self.denoise.run(None, feed | {"prefix": prefix, "mask": mask})
        return x


def optimized(path: Path, to: Path) -> Path:
    """The graph that ONNX Runtime runs, after its own passes."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(to)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{to.name}.data")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return to
