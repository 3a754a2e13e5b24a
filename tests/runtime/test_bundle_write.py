"""Writing a bundle: whole or not at all, whenever the writer is killed, and never over something else."""

import fcntl
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from support import bundles

from chatvla_edge.runtime.bundle import BundleError, BundleWriter, Contents, Jpeg, open_bundle
from chatvla_edge.runtime.bundle.text import encode

CONTENTS = Contents.model_validate(bundles.contents())


def write(destination: Path, contents: Contents = CONTENTS, **more: bytes):
    with BundleWriter(destination) as writer:
        for name, data in {**bundles.FILES, **more}.items():
            writer.add(name, data)
        return writer.commit(contents)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_written_is_what_is_read(tmp_path):
    bundle = write(tmp_path / "bundle")
    again = open_bundle(tmp_path / "bundle")
    assert again.manifest == bundle.manifest
    assert again.seal == bundle.seal
    assert Contents.model_validate(again.manifest.model_dump(exclude={"files"})) == CONTENTS
    assert {name: again.read(name) for name in again.manifest.files} == bundles.FILES
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == encode(bundle.manifest)
    assert leftovers(tmp_path) == ["bundle"]


def test_writer_and_hand_lay_the_same_bytes(tmp_path):
    write(tmp_path / "written")
    laid = bundles.lay(tmp_path / "laid")
    assert (tmp_path / "written" / "manifest.json").read_bytes() == (laid / "manifest.json").read_bytes()


def test_the_order_in_which_files_are_added_leaves_no_trace(tmp_path):
    write(tmp_path / "one")
    with BundleWriter(tmp_path / "two") as writer:
        for name in reversed(bundles.FILES):
            writer.add(name, bundles.FILES[name])
        writer.commit(CONTENTS)
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_files_come_from_bytes_from_a_file_from_a_stream_and_from_a_library(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bundles.FILES["stages/language.onnx.data"] * 300)
    large = source.read_bytes()
    calls = []
    with BundleWriter(tmp_path / "bundle") as writer:
        for name, data in bundles.FILES.items():
            if name == "stages/language.onnx.data":
                writer.add(name, source)
            elif name == "stages/condition.onnx":
                with writer.create(name) as file:
                    for byte in data:
                        file.write(bytes([byte]))
                assert file.size == len(data)
            elif name == "stages/denoise.onnx":
                writer.path(name).write_bytes(large + data)
            else:
                writer.add(name, data)
        bundle = writer.commit(CONTENTS, progress=lambda *call: calls.append(call))
    assert bundle.read("stages/language.onnx.data") == large
    assert bundle.read("stages/condition.onnx") == bundles.FILES["stages/condition.onnx"]
    assert bundle.read("stages/denoise.onnx") == large + bundles.FILES["stages/denoise.onnx"]
    assert {name for name, _, _ in calls} == {"stages/denoise.onnx"}
    assert len(calls) > 2
    assert calls[-1][1] == calls[-1][2]
    open_bundle(tmp_path / "bundle")


def test_a_file_changed_behind_the_writers_back_is_hashed_again(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        for name, data in bundles.FILES.items():
            writer.add(name, data)
        writer.path("stages/denoise.onnx").write_bytes(b"later")
        writer.commit(CONTENTS)
    assert open_bundle(tmp_path / "bundle").read("stages/denoise.onnx") == b"later"


def test_files_of_a_finished_bundle_are_read_only_and_as_private_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "bundle")
    finally:
        os.umask(before)
    for path in (tmp_path / "bundle").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o440)
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o750


@pytest.mark.parametrize("kind", ["bundle", "file", "empty", "link", "broken link"])
def test_nothing_is_overwritten(tmp_path, kind):
    destination = tmp_path / "bundle"
    if kind == "bundle":
        write(destination)
    elif kind == "file":
        destination.write_text("x")
    elif kind == "empty":
        destination.mkdir()
    else:
        destination.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    before = leftovers(tmp_path)
    with pytest.raises(BundleError, match="a bundle is never overwritten"):
        BundleWriter(destination)
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize("name", ["absent/bundle", "bundle.partial"])
def test_a_destination_that_cannot_be_is_refused(tmp_path, name):
    with pytest.raises(BundleError, match="Choose another name, or make the folder"):
        BundleWriter(tmp_path / name)


@pytest.mark.parametrize("appears", ["bundle", "file"])
def test_a_destination_that_appears_meanwhile_is_left_alone(tmp_path, appears):
    with BundleWriter(tmp_path / "bundle") as writer:
        for name, data in bundles.FILES.items():
            writer.add(name, data)
        if appears == "bundle":
            seal = write(tmp_path / "bundle").seal
        else:
            (tmp_path / "bundle").write_text("mine")
        with pytest.raises(BundleError, match="never overwritten"):
            writer.commit(CONTENTS)
    assert leftovers(tmp_path) == ["bundle"]
    if appears == "bundle":
        assert open_bundle(tmp_path / "bundle").seal == seal
    else:
        assert (tmp_path / "bundle").read_text() == "mine"


def test_a_rename_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BundleError, match="cannot be put into place: Directory not empty"):
        write(tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_an_export_that_gives_up_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with BundleWriter(tmp_path / "bundle") as writer:
            writer.add("tokenizer.json", b"{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add("tokenizer.json", b"{}")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"stages/extra.onnx": b"x"}, "'stages/extra.onnx', which nothing refers to"),
        ({"stages/embeddings.bin": b"short"}, "has 5 bytes, a table"),
        ({"documents/license": b"x"}, "which nothing refers to"),
    ],
)
def test_contents_and_files_that_do_not_agree_are_refused(tmp_path, files, message):
    with pytest.raises(BundleError, match=message):
        write(tmp_path / "bundle", **files)
    assert leftovers(tmp_path) == []


def test_a_file_that_was_forgotten_is_named(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add("tokenizer.json", b"{}")
        with pytest.raises(BundleError, match=r"refers to 'documents/LICENSE', which `files` does not list"):
            writer.commit(CONTENTS)


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_is_no_file_is_not_bundled(tmp_path, kind):
    with BundleWriter(tmp_path / "bundle") as writer:
        place = writer.path("stages/language.onnx")
        place.symlink_to("/etc/passwd") if kind == "link" else os.mkfifo(place)
        with pytest.raises(BundleError, match="expected files and folders alone"):
            writer.commit(CONTENTS)


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", "", "manifest.json", "MANIFEST.json"])
def test_a_name_that_no_bundle_may_hold_is_refused_at_once(tmp_path, name):
    with BundleWriter(tmp_path / "bundle") as writer:
        for use in (writer.path, lambda name: writer.add(name, b"")):
            with pytest.raises(ValueError, match=r"could leave the bundle|cannot list itself"):
                use(name)
    assert leftovers(tmp_path) == []


def test_a_file_is_added_once(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add("tokenizer.json", b"1")
        with pytest.raises(FileExistsError):
            writer.add("tokenizer.json", b"2")


def test_a_finished_writer_writes_no_more(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        for name, data in bundles.FILES.items():
            writer.add(name, data)
        writer.commit(CONTENTS)
        with pytest.raises(ValueError, match="is not being written"):
            writer.path("probes/late")
        with pytest.raises(ValueError, match="is not being written"):
            writer.commit(CONTENTS)
    assert open_bundle(tmp_path / "bundle").manifest.files.keys() == bundles.FILES.keys()


def test_what_would_not_be_read_is_not_written(tmp_path):
    steps = CONTENTS.cameras[0].preprocessing
    camera = CONTENTS.cameras[0].model_copy(update={"preprocessing": (Jpeg.model_construct(quality=700), *steps)})
    with pytest.raises(BundleError, match="quality"):
        write(tmp_path / "bundle", CONTENTS.model_copy(update={"cameras": (camera, CONTENTS.cameras[1])}))
    huge = CONTENTS.provenance.model_copy(update={"tools": {f"tool{i}": "1" * 100 for i in range(40000)}})
    with pytest.raises(BundleError, match="the limit is 4194304 bytes"):
        write(tmp_path / "bundle", CONTENTS.model_copy(update={"provenance": huge}))
    assert leftovers(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ kill


def killed_after(calls: int, destination: Path) -> bool:
    """Write in a child that kills itself at its n-th step on the file system; whether it was killed."""
    child = os.fork()
    if child == 0:
        left = calls
        steps = {(os, name): getattr(os, name) for name in ("open", "fsync", "mkdir", "chmod", "fchmod", "rename")}

        def step(original):
            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return counted

        for (module, name), original in steps.items():
            setattr(module, name, step(original))
        status = 1
        try:
            write(destination)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
def test_a_writer_killed_at_any_step_leaves_nothing_that_loads(tmp_path):
    whole = write(tmp_path / "whole").seal
    seen = {"nothing": 0, "partial": 0, "in place": 0}
    for calls in range(1000):
        place = tmp_path / str(calls)
        place.mkdir()
        killed = killed_after(calls, place / "bundle")
        for left in place.iterdir():
            if left.name == "bundle":  # it was in place already: then it is whole
                assert open_bundle(left).seal == whole
                seen["in place"] += 1
                continue
            with pytest.raises(BundleError, match="an export that did not finish"):
                open_bundle(left)
            # Even where someone takes it for a bundle by giving it another name, it is whole or refused.
            seen["partial"] += 1
            try:
                assert open_bundle(shutil.copytree(left, place / "renamed")).seal == whole
            except BundleError as error:
                assert "manifest.json" in str(error)  # noqa: PT017
            shutil.rmtree(place / "renamed")
        seen["nothing"] += not leftovers(place)
        if killed and not (place / "bundle").exists():
            write(place / "bundle")  # the next export sweeps and succeeds
        assert leftovers(place) == ["bundle"]
        shutil.rmtree(place)
        if not killed:
            break
    assert not killed
    assert seen["partial"] > 50
    assert seen["in place"] >= 1


def test_the_directory_of_a_living_writer_is_not_swept(tmp_path):
    with BundleWriter(tmp_path / "bundle") as first:
        first.add("tokenizer.json", bundles.FILES["tokenizer.json"])
        write(tmp_path / "bundle")
        assert first.path("tokenizer.json").read_bytes() == bundles.FILES["tokenizer.json"]
    assert leftovers(tmp_path) == ["bundle"]


def test_only_what_a_writer_left_for_this_destination_is_swept(tmp_path):
    ours, others = tmp_path / ".a[b]*.12345678.partial", [".a.1.partial", ".ab.1.partial", "a[b]*.partial", ".a[b]*.1"]
    for left in (ours, *(tmp_path / name for name in others)):
        left.mkdir()
        (left / "x").write_text("x")
    with BundleWriter(tmp_path / "a[b]*"):
        assert not ours.exists()
    assert leftovers(tmp_path) == sorted(others)


@pytest.mark.parametrize("progress", [True, False])
def test_a_file_that_grows_while_it_is_hashed_is_not_bundled(tmp_path, progress, monkeypatch):
    with BundleWriter(tmp_path / "bundle") as writer:
        growing = writer.path("stages/denoise.onnx")
        growing.write_bytes(b"x")
        real = os.readv

        def readv(file: int, blocks: list) -> int:
            with growing.open("ab") as opened:
                opened.write(b"x")
            return real(file, blocks)

        monkeypatch.setattr(os, "readv", readv)
        with pytest.raises(BundleError, match="a file that grows; expected a finished one"):
            writer.commit(CONTENTS, progress=(lambda *_: None) if progress else None)


def test_a_directory_swept_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(file: int, how: int) -> None:
        calls.append(file)
        if len(calls) == 1:  # someone sweeps between the making and the lock
            for left in tmp_path.iterdir():
                left.rmdir()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    write(tmp_path / "bundle")
    assert len(calls) == 2
    assert leftovers(tmp_path) == ["bundle"]
