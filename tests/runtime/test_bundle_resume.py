"""A bundle written in steps: what a killed writer finished is taken over; nothing stale, nothing that loads."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bundles

from chatvla_edge.runtime.bundle import BundleError, BundleWriter, Contents, ResumableWriter, open_bundle

CONTENTS = Contents.model_validate(bundles.contents())
KEY, OTHER = "a" * 64, "b" * 64
STEPS = {
    "language": [name for name in bundles.FILES if "language" in name],
    "denoise": [name for name in bundles.FILES if "denoise" in name],
}
REST = [name for name in bundles.FILES if not any(name in files for files in STEPS.values())]
LEDGER = ".ledger.json"


def make(writer, name, key=KEY):
    with writer.step(name, key):
        for file in STEPS[name]:
            writer.add(file, bundles.FILES[file])


def write(destination: Path, key: str = KEY):
    """Write the bundle, or go on with it; returns it and the steps that were taken over."""
    with ResumableWriter(destination) as writer:
        taken = [name for name in STEPS if writer.take_over(name, key)]
        for name in STEPS:
            if name not in taken:
                make(writer, name, key)
        for file in REST:
            writer.add(file, bundles.FILES[file])
        return writer.commit(CONTENTS), taken


def stop_after(destination: Path, *names: str, key: str = KEY) -> Path:
    """Leave these steps finished; returns where they lie."""
    with suppress(KeyboardInterrupt), ResumableWriter(destination) as writer:
        for name in names:
            make(writer, name, key)
        writer.add(REST[0], b"no step's")
        raise KeyboardInterrupt
    return destination.with_name(f".{destination.name}.work.partial")


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def seal(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole") / "bundle"
    with BundleWriter(place) as writer:
        for name, data in bundles.FILES.items():
            writer.add(name, data)
        return writer.commit(CONTENTS).seal


def test_without_an_interruption_it_is_any_writer(tmp_path, seal):
    bundle, taken = write(tmp_path / "bundle")
    assert (bundle.seal, taken) == (seal, [])
    assert leftovers(tmp_path) == ["bundle"]
    assert open_bundle(tmp_path / "bundle").seal == seal


def test_finished_steps_are_taken_over_and_nothing_else_is_kept(tmp_path, seal):
    work = stop_after(tmp_path / "bundle", "language")
    assert leftovers(tmp_path) == [work.name]
    assert sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()) == sorted(
        [LEDGER, *STEPS["language"]]
    )
    with pytest.raises(BundleError, match="an export that did not finish"):
        open_bundle(work)
    bundle, taken = write(tmp_path / "bundle")
    assert (bundle.seal, taken) == (seal, ["language"])
    assert leftovers(tmp_path) == ["bundle"]


def test_what_was_made_from_something_else_is_made_again(tmp_path, seal):
    stop_after(tmp_path / "bundle", "language", "denoise", key=OTHER)
    bundle, taken = write(tmp_path / "bundle")
    assert (bundle.seal, taken) == (seal, [])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit": lambda work: flip(work / STEPS["language"][0]),
    "cut": lambda work: os.truncate(work / STEPS["language"][0], 1),
    "gone": lambda work: (work / STEPS["language"][-1]).unlink(),
    "a link": lambda work: [
        (work / STEPS["language"][0]).unlink(),
        (work / STEPS["language"][0]).symlink_to("/dev/zero"),
    ],
    "a fifo": lambda work: [(work / STEPS["language"][0]).unlink(), os.mkfifo(work / STEPS["language"][0])],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_made_again_and_the_others_are_not(tmp_path, seal, kind):
    DAMAGE[kind](stop_after(tmp_path / "bundle", "language", "denoise"))
    bundle, taken = write(tmp_path / "bundle")
    assert (bundle.seal, taken) == (seal, ["denoise"])


LEDGERS = {
    "empty": b"",
    "no json": b"{",
    "deep": b"[" * 100_000,
    "newer": b'{"schema_version": 2, "steps": {}}',
    "climbs": json.dumps(
        {"schema_version": 1, "steps": {"x": {"key": KEY, "files": {"../x": {"sha256": KEY, "size": 1}}}}}
    ).encode(),
    "large": b" " * (1 << 21),
    "not utf-8": b"\xff",
}


@pytest.mark.parametrize("kind", LEDGERS)
def test_a_ledger_that_is_none_gives_up_all_steps(tmp_path, seal, kind):
    work = stop_after(tmp_path / "bundle", "language")
    (work / LEDGER).write_bytes(LEDGERS[kind])
    bundle, taken = write(tmp_path / "bundle")
    assert (bundle.seal, taken) == (seal, [])


@settings(max_examples=20, deadline=None)
@given(data=st.binary(max_size=300))
def test_no_ledger_makes_the_writer_fail(data, tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz") / "bundle"
    work = stop_after(place, "language")
    good = (work / LEDGER).read_bytes()
    (work / LEDGER).write_bytes(good[: len(data)] + data + good[len(data) :])
    write(place)
    shutil.rmtree(place.parent)


def test_a_step_left_by_an_exception_leaves_no_file(tmp_path):
    with ResumableWriter(tmp_path / "bundle") as writer:
        make(writer, "language")

        def half() -> None:
            with writer.step("denoise", KEY):
                writer.add(STEPS["denoise"][0], b"half")
                raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space"):
            half()
        assert list(writer.finished) == ["language"]
        assert not (writer.directory / STEPS["denoise"][0]).exists()
        make(writer, "denoise")
        with pytest.raises(ValueError, match="inside another"), writer.step("x", KEY):
            make(writer, "language")


def test_an_export_that_finished_nothing_leaves_nothing(tmp_path):
    stop_after(tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_two_exports_to_one_place_are_refused_and_the_first_is_not_disturbed(tmp_path, seal):
    with ResumableWriter(tmp_path / "bundle") as first:
        make(first, "language")
        with (
            pytest.raises(BundleError, match="another export that is writing there"),
            ResumableWriter(tmp_path / "bundle"),
        ):
            pass
        write(tmp_path / "other")
        make(first, "denoise")
        for file in REST:
            first.add(file, bundles.FILES[file])
        assert first.commit(CONTENTS).seal == seal


def test_writers_to_names_that_contain_each_other_do_not_sweep_each_other(tmp_path):
    works = [stop_after(tmp_path / name, "language") for name in ("a", "a.b", "a.work", "a.12345678")]
    for name in ("a", "a.b"):
        with BundleWriter(tmp_path / name):
            pass
    assert all((work / LEDGER).is_file() for work in works)


def test_the_work_of_an_export_is_not_a_bundle_under_any_name(tmp_path):
    work = stop_after(tmp_path / "bundle", "language", "denoise")
    shutil.copytree(work, tmp_path / "renamed")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(tmp_path / "renamed")


# ------------------------------------------------------------------------------------------------------------ kill


def killed_after(calls: int, destination: Path) -> bool:
    """Write in a child that kills itself at its n-th step on the file system; whether it was killed."""
    child = os.fork()
    if child == 0:
        left = calls
        names = ("open", "fsync", "mkdir", "chmod", "fchmod", "rename", "replace", "unlink")
        originals = {name: getattr(os, name) for name in names}

        def step(original):
            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return counted

        for name, original in originals.items():
            setattr(os, name, step(original))
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
def test_a_writer_killed_at_any_step_is_gone_on_with(tmp_path, seal):
    """Also killed twice: the second child takes over what the first left, and is killed a little later."""
    most, killed, calls = 0, True, 0
    while killed:
        place = tmp_path / str(calls)
        place.mkdir()
        killed = killed_after(calls, place / "bundle")
        if killed and calls % 8 == 0 and not (place / "bundle").exists():
            killed_after(calls // 2, place / "bundle")
        for left in place.iterdir():
            if left.name == "bundle":
                assert open_bundle(left).seal == seal
            else:
                with pytest.raises(BundleError, match="an export that did not finish"):
                    open_bundle(left)
        if not (place / "bundle").exists():
            bundle, taken = write(place / "bundle")
            assert bundle.seal == seal
            most = max(most, len(taken))
        assert leftovers(place) == ["bundle"]
        shutil.rmtree(place)
        calls += 2
    assert calls > 60
    assert most == len(STEPS)
