"""The manifest: everything a robot must know about a policy before it loads one byte of it.

`Contents` is what an export states; `Manifest` adds the account of the files, which only the writer can give.
"""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .geometry import Geometry
from .preprocessing import Side, Step, size_after
from .semantics import Normalization, Semantics, Timing, components
from .stages import Stage, Stages, Target
from .values import Count, Data, FileName, Float32, Name, Sha256, Table, file_name, repeated

FORMAT: Literal["chatvla-edge-bundle"] = "chatvla-edge-bundle"
SCHEMA_VERSION: Literal[1] = 1


class Camera(Data):
    """One camera of the policy, in the order in which its image stands in the prompt. Frames are RGB, uint8."""

    name: Name
    height: Side
    width: Side
    preprocessing: tuple[Step, ...] = Field(max_length=32)
    grid: tuple[Count, Count] = Field(description="rows and columns of patches after all steps")

    @model_validator(mode="after")
    def _consistent(self) -> "Camera":
        size_after(self.preprocessing, self.height, self.width)
        return self


class Pixels(Data):
    """From grey levels to what the patches hold: (level / 255 - mean) / std per channel, R, G, B."""

    mean: tuple[Float32, Float32, Float32]
    std: tuple[Float32, Float32, Float32]

    @model_validator(mode="after")
    def _consistent(self) -> "Pixels":
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, found {list(self.std)}")
        return self


class SamplerStep(Data):
    """One denoising step: sqrt(alpha_bar) and sqrt(1 - alpha_bar), here and at the next step, as `denoise` takes them.

    Computed at export, in the exporter's arithmetic, so that no robot computes a schedule of its own.
    """

    timestep: int = Field(ge=0)
    signal: float = Field(gt=0, le=1)
    noise: float = Field(gt=0, le=1)
    next_signal: float = Field(gt=0, le=1)
    next_noise: float = Field(ge=0, le=1)


class Sampler(Data):
    """DDIM, eta 0, epsilon prediction, clipped x0. Steps stand noisiest first."""

    kind: Literal["ddim"]
    train_steps: Count
    clip: float = Field(gt=0)
    steps: tuple[SamplerStep, ...] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _consistent(self) -> "Sampler":
        times = [step.timestep for step in self.steps]
        if any(later >= earlier for earlier, later in pairwise(times)):
            raise ValueError(f"timesteps must fall, found {times}")
        if times[0] >= self.train_steps:
            raise ValueError(f"timestep {times[0]} lies outside the {self.train_steps} training steps")
        ends = [(step.signal, step.noise) for step in self.steps[1:]] + [(1.0, 0.0)]
        for i, (step, end) in enumerate(zip(self.steps, ends, strict=True)):
            # 1e-5: an fp32 square root of an fp32 difference; a schedule of another kind is off by 1e-2 and more.
            if abs(step.signal**2 + step.noise**2 - 1) > 1e-5:
                raise ValueError(f"step {i}: signal and noise do not have power 1")
            if abs(step.next_signal - end[0]) > 1e-6 or abs(step.next_noise - end[1]) > 1e-6:
                raise ValueError(f"step {i} ends at {(step.next_signal, step.next_noise)}, the next begins at {end}")
        return self


class Tokens(Data):
    """Ids of the special tokens; `stop` ends the reasoning."""

    im_start: int = Field(ge=0)
    im_end: int = Field(ge=0)
    vision_start: int = Field(ge=0)
    vision_end: int = Field(ge=0)
    image_pad: int = Field(ge=0)
    endoftext: int = Field(ge=0)
    stop: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=16)

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them."""
        named = (self.im_start, self.im_end, self.vision_start, self.vision_end, self.image_pad, self.endoftext)
        return *named, *self.stop


class Prompt(Data):
    """The text around images and instruction, special tokens spelled out: `{images}`, then `{instruction}`, once each.

    An image is `vision_start`, one `image_pad` per merged patch, `vision_end`.
    """

    template: str = Field(max_length=16384)
    tokens: Tokens
    max_reasoning_tokens: Count

    @model_validator(mode="after")
    def _consistent(self) -> "Prompt":
        text = self.template
        places = [text.find(slot) for slot in ("{images}", "{instruction}")]
        if min(places) < 0 or text.count("{images}") + text.count("{instruction}") != 2 or places[0] > places[1]:
            raise ValueError(f"expected {{images}} and then {{instruction}}, once each, found {text[:200]!r}")
        return self


class CalibrationSet(Data):
    """The data that quantization was calibrated with."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    sha256: Sha256
    samples: Count


class Provenance(Data):
    """Where the bundle comes from. `created` is a date, and absent where two exports shall be equal byte by byte."""

    checkpoint_sha256: Sha256
    checkpoint_name: Annotated[str, Field(max_length=256)]
    variant: Annotated[str, Field(min_length=1, max_length=256)]
    tools: Table[Annotated[str, Field(min_length=1, max_length=128)]] = Field(description="name -> version")
    calibration: CalibrationSet | None
    created: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)?$")] | None


class GateResult(Data):
    """One gate as it stood at export. `value` is null where the measurement was no finite number."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9_./-]{0,127}$")]
    kind: Literal["lowering_parity", "quantization_error"]
    value: float | None
    limit: float
    verdict: Literal["passed", "failed", "reported"] = Field(description="reported: measured, and not gated")


class Gates(Data):
    """The gates at export; each that failed must have been allowed by name."""

    results: tuple[GateResult, ...] = Field(max_length=4096)
    allowed_failed_gates: tuple[str, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "Gates":
        if twice := repeated(result.name for result in self.results):
            raise ValueError(f"two results have the name {twice[0]!r}")
        failed = {result.name for result in self.results if result.verdict == "failed"}
        allowed = set(self.allowed_failed_gates)
        if unforgiven := sorted(failed - allowed):
            raise ValueError(
                f"the gates {unforgiven} failed and were not allowed to: export again, or with --allow-failed-gates"
            )
        if idle := sorted(allowed - failed):
            raise ValueError(f"the gates {idle} are allowed to fail but did not")
        return self


class File(Data):
    """One file of the bundle."""

    sha256: Sha256
    size: int = Field(ge=0, le=2**46)


class Contents(Data):
    """What an export states about its bundle. See the models of the fields."""

    format: Literal["chatvla-edge-bundle"] = FORMAT
    schema_version: Literal[1] = SCHEMA_VERSION
    geometry: Geometry
    semantics: Semantics
    timing: Timing
    normalization: Normalization
    cameras: tuple[Camera, ...] = Field(min_length=1, max_length=16)
    pixels: Pixels
    sampler: Sampler
    prompt: Prompt
    target: Target
    stages: Stages
    tokenizer: FileName
    parity: FileName
    probes: tuple[FileName, ...]
    plugin: tuple[FileName, ...] = Field(description="sources of the TensorRT plugin, compiled on the robot")
    documents: tuple[FileName, ...] = Field(description="licences and notes that travel along")
    gates: Gates
    provenance: Provenance

    @model_validator(mode="after")
    def _agree(self) -> "Contents":
        for problem in _disagreements(self):
            raise ValueError(problem)
        return self

    @property
    def roles(self) -> Iterator[tuple[str, str]]:
        """File and role of every file that something refers to."""
        for stage_name, stage in self.stages.named():
            yield stage.file, f"graph of {stage_name}"
            yield from ((file, f"data of {stage_name}") for file in stage.files[1:])
        yield self.tokenizer, "tokenizer"
        yield self.parity, "parity"
        for role, files in (("probes", self.probes), ("plugin", self.plugin), ("documents", self.documents)):
            yield from ((file, role) for file in files)


class Manifest(Contents):
    """`manifest.json`: the contents and every file's digest and size."""

    files: Table[File] = Field(max_length=8192)

    @model_validator(mode="after")
    def _account(self) -> "Manifest":
        for name in self.files:
            file_name(name)
        roles = dict(self.roles)
        if missing := sorted(set(roles) - set(self.files)):
            raise ValueError(f"{roles[missing[0]]} refers to {missing[0]!r}, which `files` does not list")
        if idle := sorted(set(self.files) - set(roles)):
            raise ValueError(f"`files` lists {idle[0]!r}, which nothing refers to")
        _refuse_colliding(list(self.files))
        table = self.stages.language.embeddings
        if table is not None and self.files[table.file].size != table.bytes:
            raise ValueError(
                f"{table.file!r} has {self.files[table.file].size} bytes, a table {list(table.shape)} {table.dtype} "
                f"has {table.bytes}"
            )
        return self

    def stage_digest(self, stage: Stage) -> str:
        """SHA-256 over the names' digests of everything the engine reads: the key under which its build is cached."""
        lines = [f"{name} {self.files[name].sha256}\n" for name in stage.files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _refuse_colliding(names: list[str]) -> None:
    """Raise where two names would be one file on some file system, or one name is a folder of the other."""
    taken: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        if (other := taken.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{other!r} and {name!r} differ in case alone")
        parts = name.split("/")
        for i in range(1, len(parts)):
            folder = "/".join(parts[:i])
            if (spelt := folders.setdefault(folder.lower(), folder)) != folder:
                raise ValueError(f"the folders {spelt!r} and {folder!r} differ in case alone")
    for name in names:
        if name.lower() in folders:
            raise ValueError(f"{name!r} is a file and a folder")


def _disagreements(contents: Contents) -> Iterator[str]:
    """What two parts of the contents say differently, each as a sentence that names both."""
    geometry, stages = contents.geometry, contents.stages
    head, language, vision = geometry.head, geometry.language, geometry.vision

    sizes = (
        ("semantics.action", len(components(contents.semantics.action)), "action_dim", head.action_dim),
        ("semantics.state", len(components(contents.semantics.state)), "state_dim", head.state_dim),
        ("normalization.action_min", len(contents.normalization.action_min), "action_dim", head.action_dim),
        ("normalization.state_mean", len(contents.normalization.state_mean), "state_dim", head.state_dim),
    )
    for where, found, name, expected in sizes:
        if found != expected:
            yield f"{where} has {found} components, geometry.head.{name} is {expected}"
    if abs(contents.timing.first_step) >= head.horizon:
        yield f"timing.first_step is {contents.timing.first_step}, beyond the horizon of {head.horizon}"

    names = [camera.name for camera in contents.cameras]
    if len(set(names)) != len(names):
        yield f"two cameras have one name: {names}"
    served = {stage.grid for stage in stages.vision}
    for camera in contents.cameras:
        height, width = size_after(camera.preprocessing, camera.height, camera.width)
        rows, columns = camera.grid
        if (height, width) != (rows * vision.patch, columns * vision.patch):
            yield (
                f"camera {camera.name!r}: preprocessing ends at {height} x {width} pixels, its grid of {rows} x "
                f"{columns} patches has {rows * vision.patch} x {columns * vision.patch}"
            )
        if rows % vision.merge or columns % vision.merge:
            yield f"camera {camera.name!r}: a grid of {rows} x {columns} patches cannot be merged by {vision.merge}"
        if camera.grid not in served:
            yield f"camera {camera.name!r}: no vision stage for its grid of {rows} x {columns}"
    if idle := sorted(served - {camera.grid for camera in contents.cameras}):
        yield f"the vision stage for the grid {idle[0]} serves no camera"

    kv = stages.language.kv
    if len(kv.past) != 2 * language.layers:
        yield f"stages.language.kv has {len(kv.past)} tensors, {language.layers} layers need {2 * language.layers}"
    shape = (1, language.kv_heads, kv.capacity, language.head_dim)
    for cached, tensors in (({*kv.past}, stages.language.inputs), ({*kv.present}, stages.language.outputs)):
        for tensor in tensors:
            if tensor.name in cached and tensor.shape != shape:
                yield f"stages.language: {tensor.name!r} has the shape {list(tensor.shape)}, expected {list(shape)}"
    table = stages.language.embeddings
    if table is not None and table.shape != (language.vocab, language.hidden):
        yield (
            f"stages.language.embeddings has the shape {list(table.shape)}, the language model "
            f"{[language.vocab, language.hidden]}"
        )

    prompt = contents.prompt
    if (highest := max(prompt.tokens.ids)) >= language.vocab:
        yield f"prompt.tokens names the id {highest}, the vocabulary ends at {language.vocab - 1}"
    images = sum(2 + camera.grid[0] * camera.grid[1] // vision.merge**2 for camera in contents.cameras)
    if images + prompt.max_reasoning_tokens >= kv.capacity:
        yield (
            f"stages.language.kv.capacity is {kv.capacity}: {images} image tokens and up to "
            f"{prompt.max_reasoning_tokens} of reasoning leave no room for the instruction"
        )
    if kv.capacity > language.max_positions:
        yield f"stages.language.kv.capacity is {kv.capacity}, the model knows {language.max_positions} positions"

    if contents.plugin and contents.target.engine.kind != "tensorrt":
        yield f"plugin lists sources, but {contents.target.engine.kind} loads no plugin"
    seen: dict[str, str] = {}
    for file, role in contents.roles:
        other = seen.setdefault(file, role)
        if other != role and not (role.startswith("data of") and other.startswith("data of")):
            yield f"{file!r} serves as {other} and as {role}"  # weights alone may be shared, by graphs of several grids
    for twice in repeated(f"{file!r} in {role}" for file, role in contents.roles):
        yield f"{twice} stands twice"
