"""The engines of a bundle: which file, which tensors, how large, and what machine they were lowered for."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .values import Count, Data, FileName, Table, Version, parsed_version, repeated

TargetName = Literal["cpu", "cuda", "rtx", "orin-jp72", "thor-jp72"]
EngineKind = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-row", "int4", "int4-row", "fp8", "fp4"]
Dtype = Literal[
    "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int8", "uint8", "int4", "uint4", "bool"
]
StageName = Literal["vision", "language", "condition", "denoise"]

_BITS = {"int4": 4, "uint4": 4, "int64": 64, "int32": 32, "float32": 32, "float16": 16, "bfloat16": 16}


class Platform(Data):
    """What a target name promises."""

    engine: EngineKind
    sm: tuple[int, ...]
    jetpack: str | None


# JetPack 6.2 carries TensorRT 10.3, which has none of the layers that the lowerings need: it has no target.
TARGETS = {
    "cpu": Platform(engine="onnxruntime", sm=(), jetpack=None),
    "cuda": Platform(engine="onnxruntime", sm=(), jetpack=None),
    "rtx": Platform(engine="tensorrt-rtx", sm=(), jetpack=None),
    "orin-jp72": Platform(engine="tensorrt", sm=(87,), jetpack="7.2"),
    "thor-jp72": Platform(engine="tensorrt", sm=(110,), jetpack="7.2"),
}


class Engine(Data):
    """The engine library. `lowered_with` is what wrote the stages; they run on `at_least <= version < below`."""

    kind: EngineKind
    lowered_with: Version
    at_least: Version
    below: Version | None

    @model_validator(mode="after")
    def _consistent(self) -> "Engine":
        if not self.accepts(self.lowered_with):
            raise ValueError(f"lowered_with {self.lowered_with} is not itself within {self.range}")
        return self

    def accepts(self, version: str) -> bool:
        """Whether a library of this version can run the stages."""
        found = parsed_version(version)
        return parsed_version(self.at_least) <= found and (self.below is None or found < parsed_version(self.below))

    @property
    def range(self) -> str:
        """In words: `1.22 or newer, below 2`."""
        return f"{self.at_least} or newer" + (f", below {self.below}" if self.below else "")


class Target(Data):
    """What the stages were lowered for. `sm`: the compute capabilities they run on (87 for 8.7), empty for any."""

    name: TargetName
    engine: Engine
    sm: tuple[Count, ...]
    jetpack: Version | None

    @model_validator(mode="after")
    def _consistent(self) -> "Target":
        promised = TARGETS[self.name]
        if self.engine.kind != promised.engine:
            raise ValueError(f"the target {self.name} runs on {promised.engine}, found {self.engine.kind}")
        if promised.sm and self.sm != promised.sm:
            raise ValueError(f"the target {self.name} has the compute capability {promised.sm}, found {self.sm}")
        if self.jetpack != promised.jetpack:
            raise ValueError(f"the target {self.name} belongs to JetPack {promised.jetpack}, found {self.jetpack}")
        if self.name == "cpu" and self.sm:
            raise ValueError(f"the target cpu has no compute capability, found {self.sm}")
        return self


Symbol = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Axis = Annotated[int, Field(ge=0, le=2**31 - 1)] | Symbol
TensorName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[!-~]+$")]


class Extent(Data):
    """The sizes that a symbolic dimension takes: buffers are laid out for `max`, kernels are tuned for `typical`."""

    min: Annotated[int, Field(ge=0, le=2**31 - 1)]
    typical: Count
    max: Count

    @model_validator(mode="after")
    def _consistent(self) -> "Extent":
        if not self.min <= self.typical <= self.max:
            raise ValueError(f"expected min <= typical <= max, found {self.min}, {self.typical}, {self.max}")
        return self


class Tensor(Data):
    """One input or output, by the name it has in the graph. An axis is a number, or a symbol of the stage's `dims`."""

    name: TensorName
    dtype: Dtype
    shape: tuple[Axis, ...] = Field(max_length=8)


class EmbeddingTable(Data):
    """Rows of the token embedding as a plain little-endian array, for a host that gathers them itself."""

    file: FileName
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[Count, Count]

    @property
    def bytes(self) -> int:
        """How large the file is."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


class Stage(Data):
    """One engine. `data` are the files that the graph itself refers to: its external weights."""

    file: FileName
    data: tuple[FileName, ...]
    precision: Precision
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    outputs: tuple[Tensor, ...] = Field(min_length=1)
    dims: Table[Extent]

    @model_validator(mode="after")
    def _tensors(self) -> "Stage":
        for side, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            if twice := repeated(tensor.name for tensor in tensors):
                raise ValueError(f"{side} name {', '.join(twice)} twice")
        used = {axis for tensor in (*self.inputs, *self.outputs) for axis in tensor.shape if isinstance(axis, str)}
        if used != set(self.dims):
            raise ValueError(f"the shapes use the symbols {sorted(used)}, dims states {sorted(self.dims)}")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Everything the engine reads."""
        return self.file, *self.data


class VisionStage(Stage):
    """Patches to image tokens, for frames cut into rows x columns patches."""

    grid: tuple[Count, Count]


class KvCache(Data):
    """Keys and values of every layer, each [1, kv_heads, capacity, head_dim].

    `in_place`: an input and its output are one buffer. `swap`: they are two, exchanged after each call.
    """

    capacity: Count
    dtype: Dtype
    sharing: Literal["in_place", "swap"]
    past: tuple[TensorName, ...]
    present: tuple[TensorName, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "KvCache":
        if len(self.past) != len(self.present):
            raise ValueError(f"{len(self.past)} tensors of past, {len(self.present)} of present")
        if twice := repeated(self.past) + repeated(self.present):
            raise ValueError(f"past or present names {', '.join(twice)} twice")
        return self


class LanguageStage(Stage):
    """Prefill, verification and decode. `embeddings` is null where the graph takes token ids."""

    kv: KvCache
    embeddings: EmbeddingTable | None

    @property
    def files(self) -> tuple[str, ...]:
        """Everything the engine and its host read."""
        return super().files if self.embeddings is None else (*super().files, self.embeddings.file)

    @model_validator(mode="after")
    def _caches(self) -> "LanguageStage":
        for side, names, tensors in (("past", self.kv.past, self.inputs), ("present", self.kv.present, self.outputs)):
            there = {tensor.name: tensor for tensor in tensors}
            for name in names:
                if name not in there:
                    raise ValueError(f"kv.{side} names {name!r}, which is no {'input' if side == 'past' else 'output'}")
                if there[name].dtype != self.kv.dtype:
                    raise ValueError(f"kv.{side} {name!r} is {there[name].dtype}, kv.dtype is {self.kv.dtype}")
        return self


class Stages(Data):
    """The four stages; `vision` once per camera grid."""

    vision: tuple[VisionStage, ...] = Field(min_length=1)
    language: LanguageStage
    condition: Stage
    denoise: Stage

    @model_validator(mode="after")
    def _consistent(self) -> "Stages":
        grids = [stage.grid for stage in self.vision]
        if len(set(grids)) != len(grids):
            raise ValueError(f"two vision stages serve one grid: {grids}")
        files = [stage.file for _, stage in self.named()]
        if len(set(files)) != len(files):
            raise ValueError(f"two stages have one file: {sorted(files)}")
        return self

    def named(self) -> Iterator[tuple[str, Stage]]:
        """Name and stage, in the order in which a query runs them; `vision[18x22]` for a grid."""
        for stage in self.vision:
            yield f"vision[{stage.grid[0]}x{stage.grid[1]}]", stage
        yield "language", self.language
        yield "condition", self.condition
        yield "denoise", self.denoise
