"""Opening a bundle: whatever is wrong with it is refused by name, before a byte of a stage reaches an engine."""

import ast
import json
import os
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import bundles
from support.bundles import path, put

from chatvla_edge.runtime.bundle import BundleError, Machine, RigNeeds, open_bundle

STAGE = "stages/language.onnx"
CPU = Machine(targets=["cpu"], engines={"onnxruntime": "1.23.2"})
ORIN = Machine(
    targets=["cpu", "orin-jp72"], engines={"onnxruntime": "1.23", "tensorrt": "10.13.3.9"}, sm=87, jetpack="7.2"
)
FRANKA = RigNeeds(cameras={"right": (480, 640), "wrist": (120, 120)}, action_dim=10, state_dim=7, rate_hz=15.0)


@pytest.fixture
def laid(tmp_path):
    return bundles.lay(tmp_path / "bundle")


def refused(directory, *, verify=True, **arguments) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(directory, verify=verify, **arguments)
    message = str(caught.value)
    assert message.startswith(str(directory)), message
    return message


def test_a_good_bundle_opens_and_hands_out_its_files(laid):
    calls = []
    with open_bundle(laid, machine=CPU, rig=FRANKA, progress=lambda *call: calls.append(call)) as bundle:
        assert bundle.size == sum(map(len, bundles.FILES.values()))
        for name, data in bundles.FILES.items():
            assert bundle.read(name) == data
            assert bundle.file_path(name).read_bytes() == data
            with bundle.open_file(name) as file:
                assert file.read() == data
    assert {name for name, _, _ in calls} == set(bundles.FILES)
    assert calls[-1][1:] == (bundle.size, bundle.size)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_a_large_file_is_hashed_block_by_block(tmp_path):
    table, files = bundles.manifest(), {**bundles.FILES, STAGE: os.urandom(3 * 2**20 + 17)}
    table["files"] = bundles.account(files)
    calls = []
    open_bundle(bundles.lay(tmp_path / "b", table, files), progress=lambda *call: calls.append(call))
    assert len([name for name, _, _ in calls if name == STAGE]) >= 4


def test_a_link_to_a_bundle_is_followed(laid, tmp_path):
    (tmp_path / "current").symlink_to(laid)
    assert open_bundle(tmp_path / "current").read("parity.json") == bundles.FILES["parity.json"]


# ------------------------------------------------------------------------------------------- the directory itself


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert "No such file" in refused(tmp_path / "absent")
    assert "Not a directory" in refused(tmp_path / "file")
    message = refused(tmp_path / "empty")
    assert "manifest.json: found no such file" in message
    assert "Without its manifest a directory is no bundle" in message
    with pytest.raises(BundleError, match="null byte"):
        open_bundle("a\0b")


def test_a_directory_that_is_being_written_is_refused(laid):
    partial = laid.rename(laid.with_name(".bundle.0a.partial"))
    assert "an export that did not finish" in refused(partial)


@pytest.mark.parametrize("kind", ["link", "broken link", "folder", "fifo", "empty", "huge", "pickle"])
def test_a_manifest_that_is_none_is_refused(laid, kind):
    manifest = laid / "manifest.json"
    manifest.rename(laid.parent / "elsewhere.json")
    if kind == "link":
        manifest.symlink_to(laid.parent / "elsewhere.json")
    elif kind == "broken link":
        manifest.symlink_to("nowhere")
    elif kind == "folder":
        manifest.mkdir()
    elif kind == "fifo":
        os.mkfifo(manifest)
    elif kind == "pickle":
        manifest.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    else:
        manifest.write_bytes(b"")
        os.truncate(manifest, 0 if kind == "empty" else 2**26)
    assert "manifest.json" in refused(laid)


# ------------------------------------------------------------------------------------------------ each byte range


@pytest.mark.parametrize("name", sorted(bundles.FILES))
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_in_any_file_is_found(laid, name, where):
    data = bytearray(bundles.FILES[name])
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 0x10
    (laid / name).write_bytes(data)
    message = refused(laid)
    assert message.startswith(f"{laid / name}: found {len(data)} bytes with SHA-256")
    assert "Copy the bundle again" in message


@pytest.mark.parametrize("name", sorted(bundles.FILES))
@pytest.mark.parametrize("change", ["truncated", "emptied", "longer", "missing"])
def test_another_length_is_found_without_hashing(laid, name, change):
    data = bundles.FILES[name]
    if change == "missing":
        (laid / name).unlink()
        assert refused(laid, verify=False).startswith(f"{laid / name}: found no such file")
        return
    (laid / name).write_bytes({"truncated": data[:-1], "emptied": b"", "longer": data + b"\0"}[change])
    assert f"{laid / name}: found" in (message := refused(laid, verify=False))
    assert f"expected {len(data)} bytes" in message


def test_swapped_stages_are_named(tmp_path):
    same = {**bundles.FILES, "stages/condition.onnx": b"a" * 99, "stages/denoise.onnx": b"b" * 99}
    table = {**bundles.manifest(), "files": bundles.account(same)}
    swapped = {**same, "stages/condition.onnx": b"b" * 99, "stages/denoise.onnx": b"a" * 99}
    message = refused(bundles.lay(tmp_path / "b", table, swapped))
    assert "stages/condition.onnx: found the contents of 'stages/denoise.onnx'" in message


@pytest.mark.parametrize("change", ["digest", "size"])
def test_a_wrong_entry_in_the_list_is_found(tmp_path, change):
    place = ("files", STAGE, "sha256" if change == "digest" else "size")
    table = put(bundles.manifest(), place, "c" * 64 if change == "digest" else 7)
    assert STAGE in refused(bundles.lay(tmp_path / "b", table))


@pytest.mark.parametrize(
    "field", ["normalization.action_max.3", "sampler.clip", "timing.first_step", "cameras.0.height"]
)
def test_an_edited_field_is_found(laid, field):
    table = json.loads((laid / "manifest.json").read_text())
    place = path(field)
    (laid / "manifest.json").write_text(json.dumps(put(table, place, bundles.at(table, place) + 1)))
    assert "the seal" in refused(laid)


def test_a_newer_schema_says_upgrade(tmp_path):
    laid = bundles.lay(tmp_path / "b", {**bundles.manifest(), "schema_version": 2, "something": "new"})
    assert "made by a newer version: found schema_version 2, this reads 1: upgrade" in refused(laid)


# --------------------------------------------------------------------------------- what else lies in the directory


@pytest.mark.parametrize(
    "stray", ["note.txt", ".DS_Store", "stages/extra.onnx", "Tokenizer.json", "tokenizer.json~", "stages/language.pkl"]
)
def test_a_file_that_is_not_listed_is_refused(laid, stray):
    (laid / stray).write_text("x")
    assert refused(laid, verify=False).startswith(f"{laid / stray}: found a file that the manifest does not list")


def test_a_folder_that_is_not_listed_is_refused_and_not_entered(laid):
    (laid / "more" / "and").mkdir(parents=True)
    (laid / "more").chmod(0)
    try:
        assert f"{laid / 'more'}: found a folder" in refused(laid)
    finally:
        (laid / "more").chmod(0o700)


def test_a_name_of_no_encoding_is_refused(laid):
    (laid / os.fsdecode(b"\xff\xfe")).write_text("x")
    assert "found a file that the manifest does not list" in refused(laid)


def replace(file: Path, kind: str, aside: Path) -> None:
    """Put something else in a file's place; links lead to the same bytes, so that no digest would tell."""
    shutil.copy(file, aside)
    file.unlink()
    if kind == "link out":
        file.symlink_to(aside)
    elif kind == "link inside":
        shutil.copy(aside, file.with_name("copy"))
        file.symlink_to("copy")
    elif kind == "broken link":
        file.symlink_to("nowhere")
    elif kind == "endless link":
        file.symlink_to(file.name)
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(file))
    elif kind == "device":
        try:
            os.mknod(file, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero: reading it never ends
        except PermissionError:
            pytest.skip("needs root")


KINDS = ["link out", "link inside", "broken link", "endless link", "fifo", "folder", "socket", "device"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_no_file_is_refused(laid, kind, verify, tmp_path, monkeypatch):
    monkeypatch.chdir(laid)  # a socket's name must be short
    replace(laid / STAGE, kind, tmp_path / "aside")
    message = refused(laid, verify=verify)
    assert str(laid / "stages") in message


@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_no_file_later_is_refused_too(laid, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(laid)
    bundle = open_bundle(laid)
    replace(laid / STAGE, kind, tmp_path / "aside")
    for use in (bundle.read, bundle.open_file, bundle.file_path):
        with pytest.raises(BundleError, match=STAGE):
            use(STAGE)


def test_a_folder_that_is_a_link_is_refused(laid):
    (laid / "stages").rename(laid.parent / "stages")
    (laid / "stages").symlink_to(laid.parent / "stages")
    assert "a symbolic link" in refused(laid)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_is_not_ours_to_read_is_named(laid):
    (laid / STAGE).chmod(0)
    assert "Permission denied" in refused(laid)


# ------------------------------------------------------------------------------------------ between check and use


def test_a_file_exchanged_after_the_check_is_not_handed_out(laid):
    bundle = open_bundle(laid)
    other = bytes(reversed(bundles.FILES[STAGE]))
    (laid / "new").write_bytes(other)
    (laid / "new").rename(laid / STAGE)
    for use in (bundle.read, bundle.open_file, bundle.file_path):
        with pytest.raises(BundleError, match="SHA-256"):
            use(STAGE)


def test_a_file_rewritten_in_place_is_not_handed_out(laid):
    bundle = open_bundle(laid)
    before = (laid / STAGE).stat()
    with (laid / STAGE).open("r+b") as file:
        file.write(b"L")
    os.utime(laid / STAGE, ns=(before.st_atime_ns, before.st_mtime_ns))  # ctime still tells
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.open_file(STAGE)


def test_a_file_whose_times_alone_changed_is_hashed_again_and_handed_out(laid):
    bundle = open_bundle(laid)
    os.utime(laid / STAGE)
    assert bundle.file_path(STAGE).read_bytes() == bundles.FILES[STAGE]


def test_without_verification_files_are_hashed_when_they_are_opened(laid):
    (laid / STAGE).write_bytes(bytes(reversed(bundles.FILES[STAGE])))
    bundle = open_bundle(laid, verify=False)
    assert bundle.read("parity.json") == bundles.FILES["parity.json"]
    for use in (bundle.read, bundle.open_file, bundle.file_path):
        with pytest.raises(BundleError, match="SHA-256"):
            use(STAGE)


def test_another_bundle_moved_into_place_does_not_get_in(laid):
    bundle = open_bundle(laid)
    laid.rename(laid.with_name("away"))
    bundles.lay(laid, files={**bundles.FILES, STAGE: b"other"})
    assert bundle.read(STAGE) == bundles.FILES[STAGE]


def test_a_file_that_grows_while_it_is_hashed_is_refused_and_not_followed_forever(laid):
    blocks = []

    def grow(name: str, done: int, total: int) -> None:
        if name == STAGE:
            blocks.append(done)
            assert len(blocks) < 10
            with (laid / STAGE).open("ab") as file:
                file.write(b"x" * 2**20)

    assert f"{laid / STAGE}: found" in refused(laid, progress=grow)
    assert len(blocks) <= 2


def test_a_file_touched_while_it_is_hashed_is_refused(laid):
    def touch(name: str, done: int, total: int) -> None:
        os.utime(laid / name)

    assert "a file that someone writes" in refused(laid, progress=touch)


def test_a_disk_that_fails_is_named(laid, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "readv", fail)
    assert "Input/output error" in (message := refused(laid))
    assert "The disk may be failing" in message


def test_only_listed_files_are_handed_out(laid):
    bundle = open_bundle(laid)
    for name in ("manifest.json", "../secret", "/etc/passwd", "absent"):
        with pytest.raises(BundleError, match="does not list"):
            bundle.open_file(name)


def test_a_closed_bundle_hands_out_nothing(laid):
    with open_bundle(laid) as bundle:
        pass
    with pytest.raises(ValueError, match="is closed"):
        bundle.read(STAGE)


def test_no_descriptor_is_left_open(laid):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = count()
    for _ in range(3):
        with open_bundle(laid) as bundle:
            bundle.read(STAGE)
            bundle.file_path(STAGE)
            bundle.open_file(STAGE).close()
    (laid / STAGE).write_bytes(b"")
    for verify in (True, False):
        refused(laid, verify=verify)
    (laid / "stray").write_bytes(b"")
    refused(laid)
    (laid / "manifest.json").write_bytes(b"")
    refused(laid)
    assert count() == before


# -------------------------------------------------------------------------------------------- machine and rig


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (
            Machine(targets=["orin-jp72", "cuda"], engines={}),
            "the target cpu; expected one that runs here: cuda, orin-jp72",
        ),
        (Machine(targets=[], engines={}), "runs here: none"),
        (
            Machine(targets=["cpu"], engines={"onnxruntime": "1.21.1"}),
            "expected onnxruntime 1.21.1, the one installed here",
        ),
        (Machine(targets=["cpu"], engines={"onnxruntime": "2.0"}), "1.22 or newer, below 2 (lowered with 1.23.2)"),
        (Machine(targets=["cpu"], engines={"tensorrt": "10.13"}), "no onnxruntime: none is here"),
    ],
)
def test_a_machine_that_cannot_run_it_is_named(laid, machine, message):
    found = refused(laid, machine=machine)
    assert "manifest.json" in found
    assert message in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"sm": 110}, "stages for compute capability 8.7; expected 11.0, this GPU's"),
        ({"sm": None}, "a machine without GPU"),
        ({"jetpack": "6.2"}, "stages for JetPack 7.2; expected 6.2, this machine's"),
        ({"jetpack": None}, "a machine without JetPack"),
        ({"engines": {"tensorrt": "10.3"}}, "tensorrt 10.13 or newer"),
    ],
)
def test_a_jetson_of_another_kind_is_named(tmp_path, change, message):
    files = {**bundles.FILES, "plugin/topk_moe.cu": b"cu\n"}
    del files["stages/embeddings.bin"]
    table = {**bundles.manifest_of_joints(), "files": bundles.account(files)}
    laid = bundles.lay(tmp_path / "b", table, files)
    machine = Machine(**{**ORIN.__dict__, **change})
    if message is None:
        assert open_bundle(laid, machine=machine).manifest.target.name == "orin-jp72"
    else:
        assert message in refused(laid, machine=machine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": {"right": (480, 640)}}, "the camera 'wrist'; expected one of the rig's cameras: right"),
        ({"cameras": {}}, "the rig's cameras: none"),
        (
            {"cameras": {"right": (640, 480), "wrist": (120, 120)}},
            "frames of 480 x 640 from the camera 'right'; expected 640 x 480",
        ),
        ({"action_dim": 14}, "10 action components; expected 14"),
        ({"state_dim": 14}, "7 state components; expected 14"),
        ({"rate_hz": 50.0}, "actions at 15.0 Hz; expected 50.0 Hz"),
    ],
)
def test_a_rig_that_does_not_match_is_named(laid, change, message):
    assert message in refused(laid, rig=RigNeeds(**{**FRANKA.__dict__, **change}))


def test_a_rig_may_have_more_cameras_and_any_rate(laid):
    more = {**FRANKA.cameras, "left": (1, 1)}
    open_bundle(laid, rig=RigNeeds(cameras=more, action_dim=10, state_dim=7))


def test_machine_and_rig_are_asked_before_anything_is_hashed(laid):
    (laid / STAGE).write_bytes(b"")
    assert "action components" in refused(laid, rig=RigNeeds(cameras=FRANKA.cameras, action_dim=1, state_dim=7))


# --------------------------------------------------------------------------------------------------------- pickle


def test_nothing_here_can_unpickle():
    package = Path(find_spec("chatvla_edge.runtime.bundle").origin).parent
    imported = set()
    for source in package.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert "hashlib" in imported
    assert not imported & {"pickle", "marshal", "shelve", "dill", "torch", "joblib", "yaml", "importlib"}
