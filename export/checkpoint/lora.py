"""Merge a LoRA checkpoint with its base, one tensor at a time.

A LoRA run of the public training scripts leaves ``adapter_model.safetensors`` (or ``.bin``), ``adapter_config.json``
and ``non_lora_trainables.bin``. The reference applies them in this order: base, overridden by the non-LoRA tensors,
then ``W + scale * B @ A`` (DexVLA, ``qwen2_vla/model_load_utils.py``; the scale as in PEFT). It passes over names that
match nothing; here every one of them has to match.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, at, refusal
from .files import inside, open_for_reading
from .source import TensorEntry, TensorSource, overlay
from .tensors import open_tensors

__all__ = ["CheckpointError", "is_lora", "open_lora"]

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
NON_LORA = "non_lora_trainables.bin"
# Settings that change nothing about a merge, or that are read below. Any other one that is set is refused by its name:
# DoRA, patterns of ranks, replicated layers and whatever comes next would make silently wrong numbers.
_UNDERSTOOD = frozenset(
    """auto_mapping base_model_name_or_path bias eva_config exclude_modules inference_mode init_lora_weights
    layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config megatron_core
    modules_to_save peft_type peft_version qalora_group_size r revision runtime_config target_modules task_type
    use_rslora""".split()  # noqa: SIM905  a list of words reads better as one
)
# Ways of initialising that leave the base weights alone.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_WRONG_BASE = "Pass the base model that the adapter was trained on."


def is_lora(directory: str | Path) -> bool:
    """Return whether a directory holds a LoRA adapter."""
    return any((Path(directory) / name).exists() for name in ADAPTERS)


def open_lora(base: TensorSource | str | Path, adapter: str | Path) -> TensorSource:
    """Return base, non-LoRA tensors and adapter as one source of merged tensors, computed when they are read.

    A merged tensor is ``W + scale * B @ A`` in fp32, rounded once to the dtype of W; scale is ``lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` with rsLoRA. Tensors of `NON_LORA` keep their own dtype (fp32 in public checkpoints) and
    override the base's; W is the override where there is one.

    Args:
        base: the base model, a directory or file for `open_tensors`, or a source with the names of the training code.
        adapter: the directory of the LoRA checkpoint.

    Raises:
        CheckpointError: a setting that is not understood, a tensor of the adapter that has no partner or no target, or
            a shape that does not fit the base; everything that `open_tensors` refuses.
    """
    directory = Path(adapter)
    present = [name for name in ADAPTERS if (directory / name).exists()]
    if not present:
        raise refusal(directory, found="no adapter", expected=" or ".join(ADAPTERS), do="Pass the LoRA checkpoint.")
    config = _read_config(directory / CONFIG)
    tensors = open_tensors(inside(directory, present[0], directory))
    notes = [f"{directory} holds {' and '.join(present)}: the first is read."] if len(present) > 1 else []
    below = base if isinstance(base, TensorSource) else open_tensors(base)
    if (directory / NON_LORA).exists():
        below = overlay(below, _non_lora(open_tensors(inside(directory, NON_LORA, directory))))
    pairs, saved = _sort(tensors, config)
    below = overlay(below, saved)
    merged = {
        f"{module}.weight": _merged(module, sides, below, config, str(directory)) for module, sides in pairs.items()
    }
    return TensorSource({**below, **merged}, [*below.notes, *notes])


def _read_config(path: Path) -> Mapping[str, Any]:
    with open_for_reading(path) as file:
        try:
            config = json.loads(file.read().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise refusal(
                path, found=f"no JSON ({error})", expected="the settings", do="Copy the file again."
            ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = f"peft_type {config.get('peft_type')!r}" if isinstance(config, dict) else "no JSON object"
        raise refusal(
            path, found=found, expected="peft_type 'LORA'", do="Merge this adapter with PEFT and save the result."
        )
    strange = [f"{key} = {value!r:.60}" for key, value in config.items() if value and key not in _UNDERSTOOD]
    if config.get("bias", "none") != "none":
        strange.append(f"bias = {config['bias']!r:.60}")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        strange.append(f"init_lora_weights = {config['init_lora_weights']!r:.60}")
    if strange:
        raise refusal(
            path,
            found=", ".join(strange),
            expected="plain LoRA (or rsLoRA) on linear layers, without bias",
            do="Merge this adapter with PEFT and save the result.",
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise refusal(
            path, found=f"r {rank!r:.40} and lora_alpha {alpha!r:.40}", expected="numbers", do="Copy the file again."
        )
    return config


def _non_lora(source: TensorSource) -> TensorSource:
    """Return the tensors trained beside the adapter under the names of the base model.

    PEFT's wrapper puts ``base_model.model.`` before every name. Files written from inside it lost the first part, which
    the reference tells by the action head. The file holds copies of the adapter too; the adapter's own are used.
    """
    short = {name: name.removeprefix("base_model.") for name in source}
    wrapped = all(name.startswith("base_model.model.") for name in source)
    if wrapped or any(name.startswith("model.policy_head.") for name in short.values()):
        short = {name: part.removeprefix("model.") for name, part in short.items()}
    names: dict[str, str] = {}
    copies = 0
    for old, part in short.items():
        if ".lora_" in part or ".original_module." in part:
            copies += 1
            continue
        new = part.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if new in names:
            raise refusal(
                at(source.origin(old), old),
                found=f"{names[new]!r}, which is the same tensor {new!r} without its prefix",
                expected="each tensor once",
                do="Convert the checkpoint again with zero_to_fp32.py.",
            )
        names[new] = old
    view = source.renamed(names)
    note = [f"{NON_LORA} holds {copies} copies of adapter tensors or of what they replace: not used."] if copies else []
    return TensorSource(view, [*view.notes, *note])


def _sort(tensors: TensorSource, config: Mapping[str, Any]) -> tuple[dict[str, dict[str, TensorEntry]], TensorSource]:
    """Return (module -> side -> entry) of the LoRA pairs, and the modules saved in full under their base names."""
    pairs: dict[str, dict[str, TensorEntry]] = {}
    saved: dict[str, str] = {}
    full: Iterable[str] = config.get("modules_to_save") or ()
    for name, entry in tensors.items():
        bare = name.removeprefix("base_model.model.")
        found = _PAIR.fullmatch(bare)
        module = bare.replace(".modules_to_save.default", "").rpartition(".")[0]
        if found:
            sides = pairs.setdefault(found["module"], {})
            if found["side"] in sides:
                raise refusal(
                    at(entry.origin, name),
                    found="a second one of this side",
                    expected="one A and one B",
                    do=_WRONG_BASE,
                )
            # Through the source, so that NaN in an adapter is refused under the adapter's own name.
            sides[found["side"]] = TensorEntry(entry.shape, entry.dtype, entry.origin, partial(tensors.read, name))
        elif ".lora_" not in bare and any(module == item or module.endswith(f".{item}") for item in full):
            saved[bare.replace(".modules_to_save.default", "")] = name
        else:
            raise refusal(
                at(entry.origin, name),
                found="a tensor that is no lora_A or lora_B of a linear layer and belongs to no saved module",
                expected=f"pairs, or modules among {sorted(full)}",
                do="Merge this adapter with PEFT and save the result.",
            )
    return pairs, tensors.renamed(saved)


def _merged(
    module: str, sides: Mapping[str, TensorEntry], below: TensorSource, config: Mapping[str, Any], directory: str
) -> TensorEntry:
    """Return the entry of one merged weight, after checking that its three parts fit."""
    where = at(directory, module)
    if set(sides) != {"A", "B"}:
        raise refusal(
            where, found=f"lora_{min(sides)} alone", expected="lora_A and lora_B", do="Copy the adapter again."
        )
    name = f"{module}.weight"
    if name not in below:
        raise refusal(where, found=f"no {name!r} in the base", expected="the weight that is adapted", do=_WRONG_BASE)
    weight, down, up = below[name], sides["A"], sides["B"]
    rank = config["r"]
    fits = len(weight.shape) == 2 and down.shape == (rank, weight.shape[1]) and up.shape == (weight.shape[0], rank)
    if not fits or not all(entry.dtype.is_floating_point for entry in (weight, down, up)):
        raise refusal(
            where,
            found=f"A {list(down.shape)} and B {list(up.shape)} for a {weight.dtype} weight {list(weight.shape)}",
            expected=f"A [r, in] and B [out, r] with r = {rank} for a weight [out, in] of floats",
            do=_WRONG_BASE,
        )
    scale = config["lora_alpha"] / (sqrt(rank) if config.get("use_rslora") else rank)
    origin = f"{weight.origin} + {down.origin}"
    return TensorEntry(weight.shape, weight.dtype, origin, partial(_merge, below, name, down, up, scale))


def _merge(below: TensorSource, name: str, down: TensorEntry, up: TensorEntry, scale: float) -> torch.Tensor:
    # In the order of PEFT, so that fp32 results are its bits: the product, then the scale, then the sum.
    change = (up.load().float() @ down.load().float()) * scale
    weight = below.read(name)
    return (weight.float() + change).to(weight.dtype)
