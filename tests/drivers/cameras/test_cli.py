"""`chatvla-edge camera` opens a rig's cameras, says how they do, and compares what they see."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.camera_scenes import shot
from typer.testing import CliRunner

from chatvla_edge.drivers import rig
from chatvla_edge.drivers.cameras import cli
from chatvla_edge.drivers.cameras.cli import app


@pytest.fixture
def cameras(tmp_path, monkeypatch):
    """A rig of two recordings and one that is missing; writes what they show."""

    def make(**pictures):
        found = {}
        for name, picture in pictures.items():
            if picture is not None:
                (tmp_path / name).mkdir()
                for number in range(3):
                    Image.fromarray(picture).save(tmp_path / name / f"{number}.bmp")
            options = {"source": str(tmp_path / name), "loop": True}
            found[name] = rig.Camera(driver="recording", height=480, width=640, rate=10, options=options)
        monkeypatch.setattr(cli, "SETTLE", 0.15)
        monkeypatch.setattr(rig, "load", lambda _: SimpleNamespace(cameras=found))

    return make


def call(*arguments):
    return CliRunner().invoke(app, ["camera", *map(str, arguments)])


def test_cameras_that_work_are_shown(cameras):
    cameras(top=shot(0), side=shot(1))
    result = call("show", "rig", "--seconds", 1, "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0, rows
    assert rows["top"]["rate"] == pytest.approx(10, rel=0.1)
    assert (rows["side"]["asked"], rows["side"]["clock"], rows["side"]["repeated"]) == ("640x480 at 10", "device", 0)
    assert rows["top"]["age_s"] < 0.2


def test_a_camera_that_does_not_work_is_shown_and_fails(cameras):
    cameras(top=shot(0), gone=None)
    result = call("show", "rig", "--seconds", 0.3)
    assert result.exit_code == 1
    assert "found no recording" in result.stdout.replace("\n", " ")
    assert "ok" in result.stdout


@pytest.mark.parametrize("kind", [".npy", ".png"])
def test_a_reference_is_kept_and_found_again(cameras, tmp_path, kind):
    cameras(top=shot(0))
    reference = tmp_path / f"top{kind}"
    assert call("save-reference", "rig", "top", "--reference", reference).exit_code == 0
    kept = np.load(reference) if kind == ".npy" else np.asarray(Image.open(reference))
    assert np.array_equal(kept, shot(0))
    result = call("check", "rig", "top", "--reference", reference)
    assert result.exit_code == 0, result.stdout
    assert "sees what it saw" in result.stdout


def test_a_camera_that_was_moved_fails_the_check(cameras, tmp_path):
    cameras(top=shot(0, shift=(20.0, 0.0)))
    Image.fromarray(shot(0)).save(tmp_path / "reference.png")
    result = call("check", "rig", "top", "--reference", tmp_path / "reference.png", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["shift"][0] == pytest.approx(20, abs=1)
    assert not report["ok"]
    assert "shifted" in call("check", "rig", "top", "--reference", tmp_path / "reference.png").stdout


def test_what_does_not_fit_is_refused(cameras, tmp_path):
    cameras(top=shot(0))
    reference = tmp_path / "small.npy"
    np.save(reference, shot(0)[::2])
    assert "expected (480, 640, 3)" in str(call("check", "rig", "top", "--reference", reference).exception)
    assert "found no camera 'left'" in str(call("check", "rig", "left", "--reference", reference).exception)
    assert call("save-reference", "rig", "top", "--reference", tmp_path / "a.gif").exit_code == 2
