"""Open the weights of a checkpoint directory or file, strictly.

What lies on disk is one of: a directory in the public layout (``model.safetensors``, or shards behind
``model.safetensors.index.json``, or the same with ``pytorch_model.bin``), or a single ``.safetensors``, ``.bin``,
``.ckpt``, ``.pt`` or ``.pth``. Only headers are read here; data is mapped when `TensorSource.read` asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError, at, refusal
from .files import inside, open_for_reading
from .safetensors_file import open_safetensors
from .source import TensorEntry, TensorSource, from_tensors, overlay
from .torch_file import open_torch_file

__all__ = ["CheckpointError", "TensorEntry", "TensorSource", "from_tensors", "open_tensors", "overlay"]

TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"


def open_tensors(path: str | Path, *, nested: Sequence[str] = ()) -> TensorSource:
    """Return the tensors of a checkpoint directory or file, without reading their data.

    Args:
        path: a directory in the public layout, or one weights file. Safetensors are preferred where a directory has
            both kinds, and the source's notes say so.
        nested: where the state dict lies inside a ``.bin/.ckpt/.pt/.pth`` file, e.g. ``("nets", "ema")`` for a
            stage-1 head; such files are read with ``torch.load(weights_only=True, mmap=True)`` and nothing else.

    Raises:
        CheckpointError: the weights are incomplete, damaged, ambiguous, point outside the directory, hold anything
            but tensors, or cannot be read; the message names file and tensor.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_directory(path, nested)
    except PermissionError as error:
        raise refusal(
            path, found=str(error.strerror), expected="a readable directory", do=f"Permit it, e.g. chmod u+rx {path}."
        ) from None
    return _open_file(path, nested)


def _open_file(path: Path, nested: Sequence[str]) -> TensorSource:
    if path.suffix in TORCH_SUFFIXES:
        return open_torch_file(path, nested)
    if path.suffix != ".safetensors":
        open_for_reading(path).close()  # "no such file" before "wrong kind"
        raise refusal(
            path,
            found=f"a file that ends with {path.suffix or 'nothing'!r}",
            expected=f".safetensors, {', '.join(TORCH_SUFFIXES)}, or a checkpoint directory",
            do="Pass the directory that holds the weights, or the weights file itself.",
        )
    if nested:
        raise refusal(
            path,
            found=f"the place {list(nested)} inside a safetensors file",
            expected="none: safetensors hold one flat table",
            do="Leave `nested` out for this file.",
        )
    return open_safetensors(path)


def _open_directory(directory: Path, nested: Sequence[str]) -> TensorSource:
    present = {item.name for item in directory.iterdir()}
    kinds = [kind for kind in (_SAFETENSORS, _TORCH) if kind in present or f"{kind}.index.json" in present]
    if not kinds:
        raise _nothing_to_open(directory, present)
    kind, notes = kinds[0], []
    if len(kinds) == 2:
        notes.append(f"{directory} holds safetensors and {_TORCH}: the safetensors are read.")
    index = f"{kind}.index.json"
    if index not in present:
        source = _open_file(inside(directory, kind, directory), nested)
        return TensorSource(source, notes)
    shards = _read_index(directory / index)
    if kind in present and kind not in shards.values():
        raise refusal(
            directory,
            found=f"{kind} and {index}, which does not mention it",
            expected="one of them",
            do="One is left over from another save: move the stale one away.",
        )
    used = set(shards.values())
    pattern = f"{Path(kind).stem}-*-of-*{Path(kind).suffix}"
    unused = sorted(item.name for item in directory.glob(pattern) if item.name not in used)
    if unused:
        notes.append(
            f"{directory}: {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} not in {index}, not read."
        )
    return TensorSource(_open_shards(directory, index, shards, nested), notes)


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> shard name."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise refusal(at(path, twice), found="this name twice", expected="each tensor once", do="Repair the index.")
        return table

    with open_for_reading(path) as file:
        try:
            index = json.loads(file.read().decode("utf-8"), object_pairs_hook=unique)
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise refusal(
                path, found=f"no JSON ({error})", expected="the table of the shards", do="Copy the file again."
            ) from None
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise refusal(
            path,
            found="no table of shard names under 'weight_map'",
            expected='{"weight_map": {tensor: file}}',
            do="Copy the file again.",
        )
    return table


def _open_shards(directory: Path, index: str, shards: Mapping[str, str], nested: Sequence[str]) -> TensorSource:
    """Return the tensors of all shards, each exactly where the index says it is."""
    where = directory / index
    entries: dict[str, TensorEntry] = {}
    # All names before any file: whatever else is wrong, an index that points outside is refused for that.
    paths = {shard: inside(directory, shard, where) for shard in shards.values()}
    for shard, path in paths.items():
        if not path.exists():
            listed = sum(value == shard for value in shards.values())
            raise refusal(
                path,
                found="no such file",
                expected=f"the shard that {index} names for {listed} tensors",
                do="The download is incomplete: fetch this file.",
            )
        opened = _open_file(path, nested)
        for name, entry in opened.items():
            if name in entries:
                raise refusal(
                    at(path, name),
                    found=f"this tensor here and in {entries[name].origin}",
                    expected="each tensor in one shard",
                    do="The shards are of different saves: copy the checkpoint again.",
                )
            if shards.get(name) != shard:
                raise refusal(
                    at(path, name),
                    found=f"a tensor that {index} "
                    + (f"puts in {shards[name]}" if name in shards else "does not list"),
                    expected="index and shards to agree",
                    do="The shards are of different saves: copy the checkpoint again.",
                )
            entries[name] = entry
        missing = [name for name, value in shards.items() if value == shard and name not in opened]
        if missing:
            raise refusal(
                at(path, missing[0]),
                found=f"no such tensor ({len(missing)} missing here)",
                expected=f"it, since {index} lists it",
                do="The shards are of different saves: copy the checkpoint again.",
            )
    return TensorSource({name: entries[name] for name in shards})


def _nothing_to_open(directory: Path, present: set[str]) -> CheckpointError:
    """Return the refusal of a directory without weights, with the best guess at what it is."""
    do = "Pass the checkpoint directory itself (checkpoint-XXXX), or a weights file."
    adapters = sorted(name for name in present if name.startswith(("adapter_model.", "non_lora_trainables")))
    shards = sorted(name for name in present if "-of-" in name and name.endswith((".safetensors", ".bin")))
    inner = sorted(name for name in present if name.startswith("checkpoint-"))
    if adapters:
        found = f"a LoRA checkpoint ({', '.join(adapters)})"
        do = "Pass the base model that it was trained on as well: the two are merged."
    elif shards:
        found = f"shards ({shards[0]}, ...) without their index"
        do = f"Fetch {_SAFETENSORS}.index.json as well."
    elif inner:
        found = f"{', '.join(inner[:5])}"
        do = f"Pass one of them, e.g. {directory / inner[-1]}."
    else:
        found = f"{len(present)} files, none of them weights" if present else "an empty directory"
    return refusal(directory, found=found, expected=f"{_SAFETENSORS} or {_TORCH}, or the index of their shards", do=do)
