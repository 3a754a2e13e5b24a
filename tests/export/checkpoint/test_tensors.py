"""What `open_tensors` reads, and everything that it refuses."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from chatvla_edge.export.checkpoint.tensors import (
    CheckpointError,
    TensorEntry,
    TensorSource,
    from_tensors,
    open_tensors,
    overlay,
)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def same(source, weights):
    assert set(source.names) == set(weights)
    for name, tensor in weights.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def raw_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_single_safetensors_file_is_read_as_it_was_saved(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    same(open_tensors(tmp_path), weights)
    same(open_tensors(tmp_path / "model.safetensors"), weights)


def test_shards_are_read_through_their_index_in_its_order(sharded, weights):
    source = open_tensors(sharded)
    same(source, weights)
    assert source.names == tuple(weights)
    assert source.origin("step").endswith(SECOND)
    assert source.nbytes == sum(tensor.nbytes for tensor in weights.values())


def test_a_directory_of_torch_shards_is_read_through_its_index(tmp_path, weights):
    names = list(weights)
    table = {name: f"pytorch_model-0000{1 + (i > 2)}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(table.values()):
        torch.save({name: weights[name] for name in names if table[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    same(open_tensors(tmp_path), weights)


def test_unaligned_data_is_read_right(tmp_path):
    values = torch.tensor([1.5, -2.5])
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path = raw_safetensors(tmp_path / "a.safetensors", header, b"\1\2\3" + values.numpy().tobytes())
    assert torch.equal(open_tensors(path).read("b"), values)


def test_writing_into_a_tensor_never_reaches_the_file_nor_the_next_read(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    source = open_tensors(tmp_path)
    source.read("w").zero_()
    assert torch.equal(source.read("w"), torch.ones(4))


def test_a_tensor_outlives_its_source_and_its_file(tmp_path):
    save_file({"w": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    tensor = open_tensors(tmp_path).read("w")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(tensor, torch.arange(1000.0))


def test_safetensors_are_preferred_to_bin_and_it_is_said(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    source = open_tensors(tmp_path)
    assert torch.equal(source.read("w"), torch.ones(2))
    assert "pytorch_model.bin: the safetensors are read" in source.notes[0]


def test_a_shard_that_the_index_does_not_name_is_left_alone_and_it_is_said(sharded):
    shutil.copy(sharded / FIRST, sharded / "model-00001-of-00009.safetensors")
    assert "model-00001-of-00009.safetensors is not in" in open_tensors(sharded).notes[0]


def test_links_into_the_blobs_of_the_hub_cache_are_followed(tmp_path, sharded, weights):
    repository = tmp_path / "models--Qwen--Qwen2-VL-2B-Instruct"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sharded.iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    same(open_tensors(snapshot), weights)


# ----------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nan_and_infinity_are_refused_with_name_and_count(tmp_path, bad, dtype):
    tensor = torch.zeros(5, 7, dtype=dtype)
    tensor[1, 2] = tensor[4, 6] = bad
    save_file({"model.norm.weight": tensor, "fine": torch.ones(1)}, tmp_path / "model.safetensors")
    source = open_tensors(tmp_path)
    source.read("fine")
    count = "2 NaN and 0 infinite" if bad != bad else "0 NaN and 2 infinite"
    with pytest.raises(CheckpointError, match=f"'model.norm.weight': found {count} of 35"):
        source.read("model.norm.weight")


@pytest.mark.parametrize("target", ["/etc/passwd", "../stolen.safetensors", "a/../../stolen.safetensors", "..\\x", ""])
def test_an_index_that_points_outside_the_directory_is_refused(tmp_path, sharded, target):
    shutil.copy(sharded / FIRST, tmp_path / "stolen.safetensors")
    edit_index(sharded, lambda table: table.update(step=target))
    with pytest.raises(CheckpointError, match="expected a name inside"):
        open_tensors(sharded)


def test_a_shard_that_is_a_link_out_of_the_directory_is_refused(tmp_path, sharded):
    shutil.move(sharded / FIRST, tmp_path / "elsewhere.safetensors")
    (sharded / FIRST).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"a link to .*elsewhere.safetensors"):
        open_tensors(sharded)


def test_a_link_inside_the_directory_is_followed(sharded, weights):
    shutil.move(sharded / FIRST, sharded / "first.safetensors")
    (sharded / FIRST).symlink_to("first.safetensors")
    same(open_tensors(sharded), weights)


def test_a_missing_shard_is_refused_with_its_name(sharded):
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND}: found no such file"):
        open_tensors(sharded)


def test_a_tensor_that_the_index_lists_and_the_shard_lacks_is_refused(sharded):
    edit_index(sharded, lambda table: table.update({"model.extra": FIRST}))
    with pytest.raises(CheckpointError, match=r"'model\.extra': found no such tensor"):
        open_tensors(sharded)


def test_a_tensor_that_the_shard_has_and_the_index_does_not_is_refused(sharded):
    edit_index(sharded, lambda table: table.pop("step"))
    with pytest.raises(CheckpointError, match=r"'step': found a tensor that .* does not list"):
        open_tensors(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded, weights):
    save_file({name: weights[name] for name in list(weights)[2:]}, sharded / SECOND)
    with pytest.raises(CheckpointError, match=r"'policy_head\.x_embedder\.bias': found this tensor here and in"):
        open_tensors(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(sharded):
    edit_index(sharded, lambda table: table.update({"model.norm.weight": SECOND}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight': found a tensor that .* puts in"):
        open_tensors(sharded)


def test_an_index_that_names_a_tensor_twice_is_refused(sharded):
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace('"step":', '"mask": "x.safetensors", "step":'))
    with pytest.raises(CheckpointError, match="'mask': found this name twice"):
        open_tensors(sharded)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\xff"]
)
def test_an_index_that_is_no_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=INDEX):
        open_tensors(sharded)


def test_a_stale_single_file_beside_an_index_is_refused(sharded):
    shutil.copy(sharded / FIRST, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not mention it"):
        open_tensors(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(CheckpointError, match=f"{name}: found a git-LFS pointer.*git lfs pull"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "an empty directory"),
        (["config.json"], "none of them weights"),
        (["adapter_model.safetensors", "non_lora_trainables.bin"], "a LoRA checkpoint .* Pass the base model"),
        (["model-00001-of-00002.safetensors"], "without their index"),
        (["checkpoint-500", "config.json"], "Pass one of them"),
    ],
)
def test_a_directory_without_weights_is_refused_with_a_guess_at_what_it_is(tmp_path, files, message):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        open_tensors(tmp_path)


def test_what_is_no_weights_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    os.mkfifo(tmp_path / "model.bin")
    (tmp_path / "gone.bin").symlink_to("nowhere")
    for name in ("notes.txt", "absent.safetensors", "absent", "model.bin", "gone.bin"):
        with pytest.raises(CheckpointError, match=name):
            open_tensors(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused_with_the_remedy(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match=r"Permission denied.*chmod"):
        open_tensors(tmp_path)


def test_a_permission_error_is_turned_into_a_refusal_with_the_remedy(tmp_path, monkeypatch):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(CheckpointError, match=r"Permission denied.*chmod"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 0.5, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path, weights, kept):
    data = save(weights)
    kept = int(len(data) * kept) if isinstance(kept, float) else kept
    (tmp_path / "model.safetensors").write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found"):
        open_tensors(tmp_path)


def test_trailing_bytes_are_refused(tmp_path, weights):
    (tmp_path / "model.safetensors").write_bytes(save(weights) + b"\0")
    with pytest.raises(CheckpointError, match="bytes, as its header promises"):
        open_tensors(tmp_path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"[" * 50_000,
        b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a": {"dtype":"F32","shape":[0],"data_offsets":[8,8]}}',
        b'{"a": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": entry(dtype="F8_E4M3", shape=(8,))},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=(3,))},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(2.0,))},
        {"a": entry(shape=(True, 2))},
        {"a": entry(shape=(1 << 62, 1 << 62), offsets=(0, 8))},
        {"a": entry(offsets=(8, 0))},
        {"a": entry(offsets=(4, 12))},
        {"a": entry(offsets=(0, 8, 8))},
        {"a": entry(), "b": entry()},
        {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(0,), offsets=(6, 6))},
        {},
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = raw_safetensors(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_tensors(path)


def test_a_header_longer_than_the_file_or_the_format_allows_is_refused_before_it_is_read(tmp_path):
    for length in (1 << 40, 1000):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="header"):
            open_tensors(tmp_path / "a.safetensors")


def test_a_boolean_that_is_neither_0_nor_1_is_refused(tmp_path):
    header = {"a": entry(dtype="BOOL", shape=(2,), offsets=(0, 2))}
    path = raw_safetensors(tmp_path / "a.safetensors", header, b"\1\2")
    with pytest.raises(CheckpointError, match="bytes other than 0 and 1"):
        open_tensors(path).read("a")


def test_a_file_that_shrinks_after_it_was_opened_is_refused_instead_of_crashing(tmp_path):
    save_file({"w": torch.ones(100_000)}, tmp_path / "model.safetensors")
    source = open_tensors(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="as when it was opened"):
        source.read("w")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mutated_or_truncated_safetensors_file_is_read_whole_or_refused(tmp_path, weights, data):
    original = save(weights)
    header = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]
    path = tmp_path / "model.safetensors"
    path.write_bytes(damaged)
    try:
        source = open_tensors(path)
        for name in source.names:
            source.read(name)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)  # noqa: PT017  refusing is one of the two right ends


# -------------------------------------------------------------------------------------------------------- composition


def test_a_later_layer_overrides_an_earlier_one_in_its_place():
    base = from_tensors({"a": torch.zeros(2), "b": torch.zeros(3)}, "base")
    top = from_tensors({"c": torch.ones(1), "a": torch.ones(2)}, "top")
    source = overlay(base, top)
    assert source.names == ("a", "b", "c")
    assert [source.origin(name) for name in source] == ["top", "base", "top"]
    assert torch.equal(source.read("a"), torch.ones(2))


def test_an_override_of_another_shape_is_refused_with_both_files():
    with pytest.raises(CheckpointError, match=r"top: tensor 'a': found shape \[3\]; expected \[2\].* in base"):
        overlay(from_tensors({"a": torch.zeros(2)}, "base"), from_tensors({"a": torch.zeros(3)}, "top"))


def test_a_renamed_view_shows_the_listed_tensors_under_new_names():
    source = from_tensors({"old.a": torch.zeros(2), "old.b": torch.ones(3)}, "file").renamed({"b": "old.b"})
    assert source.names == ("b",)
    assert torch.equal(source.read("b"), torch.ones(3))
    with pytest.raises(CheckpointError, match=r"file: tensor 'old\.c'"):
        from_tensors({"old.a": torch.zeros(2)}, "file").renamed({"c": "old.c"})


def test_a_computed_tensor_is_computed_when_it_is_read_and_not_before():
    calls = []
    parts = from_tensors({"q": torch.ones(2, 4), "k": torch.zeros(1, 4)})

    def fused():
        calls.append(1)
        return torch.cat([parts.read("q"), parts.read("k")])

    source = TensorSource({**parts, "qk": TensorEntry((3, 4), torch.float32, "fused", fused)})
    assert source.shape("qk") == (3, 4)
    assert not calls
    assert source.read("qk").shape == (3, 4)
    assert calls == [1]


def test_a_computed_tensor_that_is_not_what_it_announced_is_refused():
    source = TensorSource({"a": TensorEntry((2,), torch.float32, "computed", lambda: torch.zeros(3))})
    with pytest.raises(CheckpointError, match=r"float32 \[3\] when it was read; expected float32 \[2\] as announced"):
        source.read("a")


def test_a_tensor_that_does_not_exist_is_refused_with_the_files_searched():
    with pytest.raises(CheckpointError, match="file: tensor 'b'"):
        from_tensors({"a": torch.zeros(1)}, "file").read("b")
