"""Read a safetensors file without trusting it.

The format is the public one (github.com/huggingface/safetensors, README "Format"): eight bytes of little-endian header
length, a JSON header, then the data of all tensors without gaps. The header is checked whole before any tensor is
offered, and each tensor is a map of its own bytes, so a 20 GB shard costs as much memory as its largest tensor.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, at, refusal
from .files import file_size, open_for_reading, refuse_pointer
from .source import TensorEntry, TensorSource

# Stored names of the dtypes in which weights, counters and masks are published. The FP8 ones are left out on purpose:
# without their scales, which live elsewhere, the numbers are silently wrong.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The limit of the format's own library; a longer header is an attack or garbage.
MAX_HEADER_BYTES = 100_000_000
_RECOPY = "The file is cut off or damaged: copy or download it again and compare its size."
_REWRITE = "Nothing that writes safetensors makes such a file: download it again, or save it anew."


def open_safetensors(path: Path) -> TensorSource:
    """Return the tensors of one safetensors file, in the order of their data.

    Raises:
        CheckpointError: the file cannot be read, is a git-LFS pointer, is truncated or has trailing bytes, or its
            header is damaged, names a tensor twice, leaves gaps or overlaps, or uses an unsupported dtype.
    """
    size, header_bytes = _read_header(path)
    header = _parse_header(path, header_bytes)
    header.pop("__metadata__", None)
    data_start = 8 + len(header_bytes)
    spans = sorted(((name, _span(path, name, header[name])) for name in header), key=lambda item: item[1][2:])
    position = 0
    for name, (_, _, begin, end) in spans:
        if begin != position:
            raise refusal(
                at(path, name),
                found=f"data at byte {begin}",
                expected=f"byte {position}, where the tensor before it ends",
                do=_REWRITE,
            )
        position = end
    if data_start + position != size:
        raise refusal(
            path,
            found=f"{size} bytes",
            expected=f"{data_start + position} bytes, as its header promises for {len(spans)} tensors",
            do=_RECOPY,
        )
    return TensorSource(
        {
            name: TensorEntry(
                shape, dtype, str(path), partial(_load, path, size, name, shape, dtype, data_start + begin)
            )
            for name, (shape, dtype, begin, _) in spans
        }
    )


def _read_header(path: Path) -> tuple[int, bytes]:
    """Return the file's size and the bytes of its JSON header."""
    with open_for_reading(path) as file:
        size = file_size(file)
        prefix = file.read(8)
        refuse_pointer(path)
        if len(prefix) < 8:
            raise refusal(path, found=f"a file of {size} bytes", expected="a safetensors header", do=_RECOPY)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise refusal(
                path,
                found=f"a header length of {length} bytes",
                expected=f"at most {MAX_HEADER_BYTES}",
                do="This is not a safetensors file, or its first bytes are damaged: download it again.",
            )
        if 8 + length > size:
            raise refusal(path, found=f"{size} bytes", expected=f"a header of {8 + length} bytes", do=_RECOPY)
        return size, file.read(length)


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise refusal(at(path, twice), found="this name twice in the header", expected="each once", do=_REWRITE)
        return table

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise refusal(
            path, found=f"a header that is no JSON ({error})", expected="the table of its tensors", do=_RECOPY
        ) from None
    if not isinstance(header, dict):
        raise refusal(path, found=f"a header of type {type(header).__name__}", expected="a JSON object", do=_REWRITE)
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """Return (shape, dtype, begin, end) of one header entry; begin and end are bytes from the start of the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = sorted(entry) if isinstance(entry, dict) else repr(entry)[:80]
        raise refusal(
            at(path, name), found=f"a header entry with {found}", expected="dtype, shape, data_offsets", do=_REWRITE
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise refusal(
            at(path, name),
            found=f"dtype {str(entry['dtype'])[:40]}",
            expected=f"one of {', '.join(DTYPES)}",
            do="Save the checkpoint in bfloat16 or float32 (a quantized one must be dequantized with its scales).",
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise refusal(
            at(path, name),
            found=f"shape {str(shape)[:80]} and data_offsets {str(offsets)[:80]}",
            expected="lists of non-negative integers, the offsets as [begin, end]",
            do=_REWRITE,
        )
    begin, end = offsets
    if end - begin != prod(shape) * dtype.itemsize:
        raise refusal(
            at(path, name),
            found=f"{end - begin} bytes",
            expected=f"{prod(shape) * dtype.itemsize} bytes for {entry['dtype']} {shape}",
            do=_REWRITE,
        )
    return tuple(shape), dtype, begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _load(path: Path, size: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> torch.Tensor:
    """Return one tensor as a private map of its own bytes."""
    count = prod(shape)
    with open_for_reading(path) as file:
        # A map of a file that has shrunk dies by SIGBUS, so the size is asked again each time.
        if file_size(file) != size:
            raise refusal(
                at(path, name),
                found=f"a file of {file_size(file)} bytes",
                expected=f"{size} bytes, as when it was opened",
                do="Something writes to this checkpoint: wait for it to finish and read it again.",
            )
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        page = start - start % mmap.ALLOCATIONGRANULARITY
        nbytes = count * dtype.itemsize
        # ACCESS_COPY: torch wants writable memory, and a stray write must not reach the file. The tensor keeps the
        # map alive, the map outlives the closed file.
        data = mmap.mmap(file.fileno(), start - page + nbytes, offset=page, access=mmap.ACCESS_COPY)
    raw = torch.frombuffer(data, dtype=torch.uint8, count=nbytes, offset=start - page)
    if start % dtype.itemsize:
        raw = raw.clone()  # a header of odd length: arithmetic on unaligned elements is undefined on some machines
    if dtype == torch.bool and bool((raw > 1).any()):
        raise refusal(
            at(path, name),
            found="bytes other than 0 and 1",
            expected="booleans",
            do="The file is damaged: copy it again.",
        )
    return raw.view(dtype).reshape(shape)
