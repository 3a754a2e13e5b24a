"""The checkpoint that comes along: whole, small, and its bundles say to the letter what they said when it shipped."""

import json
from pathlib import Path

import pytest

from chatvla_edge.benchmarks.math_matching.texts import reasoning, situation
from chatvla_edge.drivers.sim.tabletop import Tabletop
from chatvla_edge.export import nano
from chatvla_edge.export.checkpoint.reader import open_checkpoint

pytest.importorskip("onnxruntime")

from chatvla_edge.benchmarks.math_matching import geometry, variants

SHIPPED = json.loads((Path(__file__).parent / "nano_texts.json").read_text(encoding="utf-8"))
"""What the fp32 bundle says to each seed's scene before anything moves."""


def _say(player, seed):
    world = Tabletop()
    world.reset(int(seed))
    return player.query(world.render(480, 640), world.state, int(seed), []).text


def test_the_checkpoint_is_the_nano_geometry_and_small():
    folder = nano.checkpoint()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec == geometry.spec((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == geometry.tokenizer()
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 25_000_000


@pytest.fixture(scope="module")
def players(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    return {name: variants.player(name, nano.checkpoint(), folder) for name in ("fp32", "int8")}


@pytest.mark.slow
def test_bundles_say_what_they_said_when_the_checkpoint_was_shipped(players):
    assert {seed: _say(players["fp32"], seed) for seed in SHIPPED} == SHIPPED


@pytest.mark.slow
def test_int8_keeps_nearly_every_text(players):
    changed = [seed for seed, text in SHIPPED.items() if _say(players["int8"], seed) != text]
    assert len(changed) <= 1, changed


@pytest.mark.slow
def test_the_texts_are_mostly_true():
    right = 0
    for seed, text in SHIPPED.items():
        world = Tabletop()
        world.reset(int(seed))
        right += text == reasoning(situation(world.scene, None))
    assert right >= len(SHIPPED) // 2
