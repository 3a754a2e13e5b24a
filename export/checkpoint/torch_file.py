"""Read a ``torch.save`` file (``.bin``, ``.ckpt``, ``.pt``, ``.pth``) without running anything that it brings.

Only `torch.load(weights_only=True, mmap=True)` is used: tensors are maps of the file, and the unpickler builds tensors
and plain containers only. A training framework's extra objects are refused, not allow-listed.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .errors import at, refusal
from .files import open_for_reading, refuse_pointer
from .safetensors_file import DTYPES
from .source import TensorEntry, TensorSource

# The pickled structure (names and shapes, no data) of the largest public checkpoint is under 1 MB.
MAX_STRUCTURE_BYTES = 64 << 20
_RESAVE = "Load it where it was made and save `{name: tensor}` alone, as safetensors."


def open_torch_file(path: Path, nested: Sequence[str] = ()) -> TensorSource:
    """Return the tensors of the state dict at `nested` inside a ``torch.save`` file, in the order of the dict.

    Raises:
        CheckpointError: the file cannot be read, is truncated, is in the format before torch 1.6, brings objects that
            would have to be run, has no dict at `nested`, or holds anything but dense CPU tensors of a known dtype.
    """
    _check_archive(path)
    table = _descend(path, _load(path), nested)
    return TensorSource({name: _entry(path, name, value) for name, value in table.items()})


def _check_archive(path: Path) -> None:
    """Refuse what the loader would take for something else: a pointer, a cut-off archive, packed or double records."""
    refuse_pointer(path)
    with open_for_reading(path) as file:
        try:
            records = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
            file.seek(0)
            legacy = file.read(1) == b"\x80"
            raise refusal(
                path,
                found="the format before torch 1.6" if legacy else "no complete zip archive",
                expected="a file of torch.save, which ends with the archive's directory",
                do="Load and save it again with a current torch." if legacy else "The file is cut off: copy it again.",
            ) from None
    names = [record.filename for record in records]
    packed = next((record.filename for record in records if record.compress_type != zipfile.ZIP_STORED), None)
    structure = sum(record.file_size for record in records if record.filename.endswith("/data.pkl"))
    if packed is not None or len(set(names)) != len(names) or not 0 < structure <= MAX_STRUCTURE_BYTES:
        problem = f"the compressed record {packed!r}" if packed else "records that are double, missing or too large"
        raise refusal(path, found=problem, expected="an archive as torch.save writes it", do=_RESAVE)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # The line that names the object; the rest advises how to allow it, which is not for a user to decide.
        reason = next((line.strip() for line in str(error).splitlines() if "nsupported" in line), str(error)[:200])
        raise refusal(path, found=f"more than tensors ({reason[:300]})", expected="tensors alone", do=_RESAVE) from None
    # Damaged bytes surface as almost any error from inside the loader; none of them may pass for a crash of ours.
    except Exception as error:  # noqa: BLE001
        raise refusal(
            path,
            found=f"a file that torch cannot load ({type(error).__name__}: {str(error)[:200]})",
            expected="a file of torch.save",
            do="The file is damaged: copy it again.",
        ) from None


def _descend(path: Path, loaded: Any, nested: Sequence[str]) -> Mapping[str, Any]:
    """Return the dict at `nested`, or say where the state dicts are."""
    table = loaded
    for key in nested:
        table = table.get(key) if isinstance(table, Mapping) else None
    if isinstance(table, Mapping) and table and not any(isinstance(value, Mapping) for value in table.values()):
        return table
    places = [_spell(place) for place in _state_dicts(loaded)]
    raise refusal(
        path,
        found=f"no state dict at {_spell(nested)}, but at {', '.join(places) or 'no place'}",
        expected="a dict of tensors",
        do="Say where it lies (`nested`)." if places else "This file holds no weights: pass the one that does.",
    )


def _spell(place: Sequence[str]) -> str:
    return "".join(f"[{key!r}]" for key in place) or "the top"


def _state_dicts(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the key paths (four deep at most) of the dicts that hold tensors."""
    if isinstance(value, Mapping) and len(place) <= 4:
        if any(isinstance(item, torch.Tensor) for item in value.values()):
            yield place
        for key, item in value.items():
            yield from _state_dicts(item, (*place, str(key)))


def _entry(path: Path, name: Any, value: Any) -> TensorEntry:
    if not isinstance(name, str):
        raise refusal(path, found=f"the key {name!r} of type {type(name).__name__}", expected="names", do=_RESAVE)
    if not isinstance(value, torch.Tensor):
        raise refusal(at(path, name), found=f"a {type(value).__name__}", expected="a tensor", do=_RESAVE)
    tensor = value.detach()
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # A view may repeat elements (stride 0): a few bytes on disk could ask for terabytes once it is made contiguous.
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise refusal(
            at(path, name),
            found=f"a {tensor.layout} tensor on {tensor.device} that is not simply its bytes",
            expected="a dense tensor",
            do=_RESAVE,
        )
    if tensor.dtype not in DTYPES.values():
        raise refusal(
            at(path, name),
            found=f"dtype {tensor.dtype}",
            expected=f"one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES.values())}",
            do="Save the checkpoint in bfloat16 or float32 (a quantized one must be dequantized with its scales).",
        )
    return TensorEntry(tuple(tensor.shape), tensor.dtype, str(path), partial(tensor.contiguous))
