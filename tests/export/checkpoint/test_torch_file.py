"""Files of torch.save: tensors come out, nothing else does, and nothing runs."""

import os
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from chatvla_edge.export.checkpoint.tensors import CheckpointError, open_tensors


def same(source, weights):
    assert set(source.names) == set(weights)
    for name, tensor in weights.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_torch_files_are_read_as_they_were_saved(tmp_path, weights, suffix):
    torch.save(weights, tmp_path / f"file{suffix}")
    same(open_tensors(tmp_path / f"file{suffix}"), weights)


@pytest.mark.parametrize("place", [("nets", "nets"), ("nets", "ema")])
def test_a_nested_state_dict_is_read_from_the_place_that_is_named(tmp_path, weights, place):
    torch.save({"nets": {place[1]: weights}}, tmp_path / "head.ckpt")
    same(open_tensors(tmp_path / "head.ckpt", nested=place), weights)


def test_a_state_dict_sought_in_the_wrong_place_is_refused_with_the_right_places(tmp_path, weights):
    torch.save({"nets": {"nets": weights, "ema": weights}}, tmp_path / "head.ckpt")
    with pytest.raises(CheckpointError, match=r"\['nets'\]\['nets'\], \['nets'\]\['ema'\]"):
        open_tensors(tmp_path / "head.ckpt")


def test_parameters_and_transposed_views_are_read_as_plain_contiguous_tensors(tmp_path):
    matrix = torch.randn(3, 5)
    torch.save({"p": torch.nn.Parameter(matrix), "t": matrix.t()}, tmp_path / "a.bin")
    source = open_tensors(tmp_path / "a.bin")
    assert torch.equal(source.read("p"), matrix)
    assert source.read("t").is_contiguous()
    assert torch.equal(source.read("t"), matrix.t())


class Executes:
    """A pickle that would leave a mark if it ran."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_torch_file_is_named_and_never_runs(tmp_path):
    torch.save({"w": torch.ones(1), "x": Executes(tmp_path / "mark")}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin: found more than tensors .*posix\.mkdir"):
        open_tensors(tmp_path / "a.bin")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (3, "'b': found a int"),
        (None, "'b': found a NoneType"),
        ([torch.ones(1)], "'b': found a list"),
        (torch.ones(3).to_sparse(), "not simply its bytes"),
        (torch.ones(1).expand(1 << 40), "not simply its bytes"),
        (torch.empty(3, device="meta"), "not simply its bytes"),
        (torch.ones(3, dtype=torch.complex64), "dtype torch.complex64"),
    ],
)
def test_entries_of_a_torch_file_that_are_no_plain_tensors_are_refused_by_name(tmp_path, value, found):
    torch.save({"a": torch.ones(1), "b": value}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=found):
        open_tensors(tmp_path / "a.bin")


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {}, {3: torch.ones(2)}])
def test_a_torch_file_that_is_no_dict_of_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        open_tensors(tmp_path / "a.bin")


def test_a_torch_file_in_the_old_format_is_refused_with_the_remedy(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1\.6.*Load and save it again"):
        open_tensors(tmp_path / "a.bin")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_torch_file_is_refused(tmp_path, weights, kept):
    torch.save(weights, tmp_path / "a.bin")
    os.truncate(tmp_path / "a.bin", int((tmp_path / "a.bin").stat().st_size * kept))
    with pytest.raises(CheckpointError, match=r"a\.bin: found no complete zip archive"):
        open_tensors(tmp_path / "a.bin")


def test_a_place_inside_safetensors_is_refused(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="one flat table"):
        open_tensors(tmp_path / "a.safetensors", nested=("nets",))


def repacked(path, change):
    """Write the archive anew with (name, bytes, compression) of each record changed."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info), zipfile.ZIP_STORED) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, packed in change(records):
            archive.writestr(name, data, packed)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda records: [(name, data, zipfile.ZIP_DEFLATED) for name, data, _ in records], "the compressed record"),
        (lambda records: [*records, records[0]], "records that are double"),
        (lambda records: [record for record in records if not record[0].endswith("data.pkl")], "missing"),
        (lambda records: [record for record in records if "/data/" not in record[0]], "torch cannot load"),
    ],
)
def test_an_archive_that_torch_did_not_write_is_refused(tmp_path, change, found):
    torch.save({"a": torch.ones(64)}, tmp_path / "a.bin")
    repacked(tmp_path / "a.bin", change)
    with pytest.raises(CheckpointError, match=found):
        open_tensors(tmp_path / "a.bin")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_torch_file_with_any_bytes_changed_is_read_or_refused(tmp_path, weights, data):
    path = tmp_path / "a.bin"
    torch.save(weights, path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        source = open_tensors(path)
        for name in source.names:
            source.read(name)
    except CheckpointError as error:
        assert "a.bin" in str(error)  # noqa: PT017  refusing is one of the two right ends
