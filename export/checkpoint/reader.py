"""Open a checkpoint of any public layout: every tensor accounted for, or an error that names it.

Nothing is read but headers and config until a tensor is asked for, so a 22 GB checkpoint opens in a blink and an
export can stream it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from chatvla_edge.export.checkpoint.config import SpecReader, View, read_json
from chatvla_edge.export.checkpoint.errors import at, refusal
from chatvla_edge.export.checkpoint.files import inside
from chatvla_edge.export.checkpoint.lora import is_lora, open_lora
from chatvla_edge.export.checkpoint.names import PREFIXES, Bond, Layout, bonds
from chatvla_edge.export.checkpoint.statistics import Statistics, find_statistics, load_statistics
from chatvla_edge.export.checkpoint.tensors import TensorEntry, TensorSource, open_tensors
from chatvla_edge.export.checkpoint.tokenizer import read_prompt
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.model.policy import ChatVLA2, ReferencePolicy
from chatvla_edge.export.model.prompt import Prompt
from chatvla_edge.export.normalization import Normalization
from chatvla_edge.export.spec import PolicySpec

# Public tensors that inference does not use, each with the reason why leaving it out is right.
IGNORABLE: tuple[tuple[str, str], ...] = (
    (r"expert_traffic", "a counter of training: how many tokens each expert saw"),
    (r"policy_head\.hidden_states_for_cosattn\.(weight|bias)", "cross-attention that inference never feeds"),
    (r".*\.rotary_emb\.inv_freq", "a table that follows from the rotary base; kept in fp32 here"),
    (r"(model\.)?visual\.rotary_pos_emb\.inv_freq", "a table that follows from the rotary base; kept in fp32 here"),
)
NO_HEAD: tuple[tuple[str, str], ...] = (
    (
        r"(policy_head|input_action_proj|reasoning_action_proj|reasoning_film)\..*",
        "the action head: not part of the vision-language view",
    ),
)


@dataclass(frozen=True)
class Ignored:
    """A tensor of the checkpoint that the policy does not hold, and why that is right."""

    name: str
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    entries: our parameter names -> tensors that are read, and checked under their public names, when asked for;
    notes: whole sentences for the user about assumptions and about config and tensors disagreeing.
    """

    path: Path
    spec: PolicySpec
    layout: Layout
    entries: Mapping[str, TensorEntry]
    ignored: tuple[Ignored, ...]
    notes: tuple[str, ...]
    config: Mapping[str, object]

    def model(self, dtype: torch.dtype = torch.float32, progress: Callable[[int], None] | None = None) -> ChatVLA2:
        """The reference model with these weights. `progress` is called with the bytes read."""
        return ChatVLA2.from_tensors(self.spec, dict(self.read(dtype, progress)))

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most parameters are stored in."""
        dtypes = [entry.dtype for entry in self.entries.values()]
        return max(set(dtypes), key=dtypes.count)

    def tensor(self, name: str) -> Tensor:
        """One parameter, by our name, in the stored dtype. Raises CheckpointError for NaN and infinity."""
        return self.entries[name].load()

    def read(
        self, dtype: torch.dtype | None = None, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """All parameters one by one, checked, in `dtype` (None: as stored). `progress` is told the bytes read."""
        for name, entry in self.entries.items():
            tensor = entry.load()
            yield name, tensor if dtype is None else tensor.to(dtype)
            if progress is not None:
                progress(entry.nbytes)

    def statistics(self, task: str | None = None) -> Statistics:
        """Normalisation statistics of the training data, from beside the checkpoint or above it."""
        found = find_statistics(self.path)
        if found is None:
            raise refusal(
                self.path,
                found="no dataset_stats.pkl or dataset_stats.json here, nor in the two folders above",
                expected="the statistics that the training wrote",
                do="Copy dataset_stats.pkl beside config.json: without it actions have no units.",
            )
        return load_statistics(found, task=task)

    def normalization(self, task: str | None = None) -> Normalization:
        """The numbers between the robot's units and the head's, fitting the head's sizes."""
        statistics = self.statistics(task)
        numbers = Normalization(
            state_mean=statistics.qpos_mean,
            state_std=statistics.qpos_std,
            action_min=statistics.action_min,
            action_max=statistics.action_max,
        )
        if self.spec.head is not None:
            numbers.require(action_dim=self.spec.head.action_dim, state_dim=self.spec.head.state_dim)
        return numbers

    def prompt(self) -> Prompt:
        """The prompt builder over the checkpoint's tokenizer."""
        return read_prompt(self.path, self.spec)

    def policy(self, preprocessing: Sequence[Preprocessing], *, task: str | None = None) -> ReferencePolicy:
        """The whole reference policy in fp32, one preprocessing per camera in the checkpoint's order."""
        numbers, prompt = self.normalization(task), self.prompt()  # what can be missing comes before gigabytes
        return ReferencePolicy(self.model(), prompt, preprocessing, numbers)


def open_checkpoint(path: str | Path, *, view: View = "robot", base: str | Path | None = None) -> Checkpoint:
    """Open a checkpoint directory strictly.

    view: `vqa` reads a ChatVLA v1 checkpoint as the question-answering model (static expert 0, no head).
    base: the Qwen2-VL directory that a LoRA checkpoint was trained on.

    Raises CheckpointError, naming file and tensor, for anything missing, extra, wrongly shaped or unreadable.
    """
    path = Path(path)
    config_file = _config_file(path)
    config = read_json(config_file)
    if is_lora(path):
        if base is None:
            raise refusal(
                path,
                found="a LoRA checkpoint (adapter_model)",
                expected="its base model as well",
                do="Name the Qwen2-VL directory it was trained on (--base DIR).",
            )
        source = open_lora(_flat(open_tensors(base)), path)
    else:
        source = open_tensors(path)
    shapes = {name: entry.shape for name, entry in source.items()}
    reader = SpecReader(config, shapes, config_file)
    try:
        spec, layout = reader.read(view)
    except (ArithmeticError, TypeError, ValidationError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise refusal(
            config_file,
            found=said.removeprefix("Value error, "),
            expected="numbers that fit each other and the tensors",
            do="Correct them, or copy the checkpoint again.",
        ) from None
    entries, ignored = account(source, spec, layout, path, view)
    return Checkpoint(path, spec, layout, entries, ignored, (*source.notes, *reader.notes), config)


def _flat(base: TensorSource) -> TensorSource:
    """A base model under the names of the training code, whichever transformers release wrote it."""
    ours = {theirs: ours for ours, theirs in PREFIXES["nested"]}
    flat = dict(PREFIXES["flat"])
    renamed = {}
    for name in base:
        prefix = next((prefix for prefix in ours if name.startswith(prefix)), None)
        renamed[name if prefix is None else flat[ours[prefix]] + name.removeprefix(prefix)] = name
    return base.renamed(renamed)


def account(
    source: TensorSource, spec: PolicySpec, layout: Layout, path: Path, view: View = "robot"
) -> tuple[Mapping[str, TensorEntry], tuple[Ignored, ...]]:
    """Tie each tensor of `source` to one of our parameters, or to the reason for leaving it out."""
    parameters = {name: tuple(value.shape) for name, value in ChatVLA2.on_meta(spec).named_parameters()}
    entries: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for bond in bonds(parameters, layout):
        for name, shape in bond.theirs.items():
            _check(source, name, shape, path)
        used.update(bond.theirs)
        entries.update(_entries(source, bond))
    ignored = []
    for name in source:
        if name in used:
            continue
        reason = _reason(name, spec, view)
        if reason is None:
            raise refusal(
                at(source.origin(name), name),
                found=f"a tensor {list(source.shape(name))} that has no place in this policy ({spec.variant}, "
                f"{spec.language.experts.summary})",
                expected="a known name",
                do="If it matters, this layout is not one this version reads; if not, strip it from the checkpoint.",
            )
        if name == "lm_head.weight":
            _check_tied(source, layout)
        ignored.append(Ignored(name, reason))
    return entries, tuple(ignored)


def _config_file(path: Path) -> Path:
    """config.json beside the weights, or one level up, where LoRA runs keep it."""
    for folder in (path, path.parent):
        if (folder / "config.json").is_file():
            return inside(folder, "config.json", folder)
    raise refusal(
        path,
        found="no config.json here nor in the folder above",
        expected="the configuration that the training saved",
        do="Copy it beside the weights: head counts, epsilons and routing are not in the tensors.",
    )


def _check(source: TensorSource, name: str, shape: tuple[int, ...], path: Path) -> None:
    if name not in source:
        raise refusal(
            at(path, name),
            found="no tensor of this name",
            expected=f"one of shape {list(shape)}",
            do="The checkpoint is incomplete or its tensor is misnamed.",
        )
    if source.shape(name) != shape:
        raise refusal(
            at(source.origin(name), name),
            found=f"shape {list(source.shape(name))}",
            expected=f"{list(shape)}, which the other tensors of this checkpoint imply",
            do="The tensor is damaged or of another model.",
        )
    if not source.dtype(name).is_floating_point:
        raise refusal(
            at(source.origin(name), name),
            found=str(source.dtype(name)),
            expected="floating-point weights",
            do="Quantized checkpoints are not read: export from the weights as trained.",
        )


def _entries(source: TensorSource, bond: Bond) -> Iterator[tuple[str, TensorEntry]]:
    """Our side of a bond as entries that read and check their public tensors when asked."""
    theirs = list(bond.theirs)
    dtype, origin = source.dtype(theirs[0]), source.origin(theirs[0])

    # Several of our parameters may lie in one public tensor and are read one after another: read and check that once.
    @lru_cache(maxsize=1)
    def parts() -> list[Tensor]:
        return list(bond.to_ours([source.read(name) for name in theirs]))

    def part(index: int) -> Tensor:
        tensor = parts()[index].contiguous()
        if index == len(bond.ours) - 1:
            parts.cache_clear()
        return tensor

    for index, (name, shape) in enumerate(bond.ours.items()):
        yield name, TensorEntry(shape, dtype, origin, partial(part, index))


def _reason(name: str, spec: PolicySpec, view: View) -> str | None:
    rules = IGNORABLE + (NO_HEAD if view == "vqa" else ())
    for pattern, reason in rules:
        if re.fullmatch(pattern, name):
            return reason
    if name == "lm_head.weight" and spec.language.tied:
        return "the embedding, stored twice: input and output are tied"
    return None


def _check_tied(source: TensorSource, layout: Layout) -> None:
    embedding = "model.embed_tokens.weight" if layout.prefixes == "flat" else "model.language_model.embed_tokens.weight"
    if not torch.equal(source.read("lm_head.weight"), source.read(embedding)):
        raise refusal(
            at(source.origin("lm_head.weight"), "lm_head.weight"),
            found="numbers that differ from the embedding's",
            expected="the same numbers: tie_word_embeddings is true",
            do="Set tie_word_embeddings to false in config.json if the model was trained with two matrices.",
        )
