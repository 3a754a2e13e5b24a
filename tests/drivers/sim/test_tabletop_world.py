"""The math-matching table as a world: what the arms do is what the camera shows, whoever runs in which process."""

import time
import uuid

import numpy as np
import pytest

from chatvla_edge.drivers import registry, rig
from chatvla_edge.drivers.sim.tabletop import ARMS, Tabletop, home_state
from chatvla_edge.drivers.sim.tabletop_world import TabletopArtist, TabletopWorld


def drive(world, target, seconds):
    for _ in range(round(seconds / world.dt)):
        world.step(target)


def test_the_artist_draws_what_the_world_s_own_table_would():
    world, artist = TabletopWorld(3, "in_domain", 9), TabletopArtist(9)
    target = world.position() + 0.1
    drive(world, target, 0.5)
    ours = artist.draw(world.scene(), 240, 320).astype(int)
    theirs = world._table.render(240, 320).astype(int)
    # Each picture has its own sensor noise, of 2 to 5 grey levels.
    assert np.abs(ours - theirs).mean() < 8
    assert np.abs(ours - theirs).max() < 60


def test_a_card_that_is_picked_moves_in_the_picture_too():
    world, artist = TabletopWorld(3, "in_domain", 9), TabletopArtist(9)
    table = world._table
    card = table.scene.cards[0]
    before = artist.draw(world.scene(), 240, 320).astype(int)
    target = world.position()
    target[:6] = ARMS[0].joints(card.x, card.y)
    drive(world, target, 2.0)
    target[6] = 0.006
    drive(world, target, 1.0)
    assert table.held[0] == 0
    target[:6] = home_state()[:6]
    drive(world, target, 2.0)
    ours = artist.draw(world.scene(), 240, 320).astype(int)
    theirs = table.render(240, 320).astype(int)
    assert np.abs(ours - theirs).mean() < 8
    assert np.abs(ours - before).mean() > np.abs(ours - theirs).mean()


def test_a_reset_lays_the_scene_of_its_seed():
    world, artist = TabletopWorld(0, "in_domain", 9), TabletopArtist(9)
    artist.draw(world.scene(), 120, 160)
    said = world.tell({"reset": 7, "split": "held_out"})
    fresh = Tabletop(9)
    fresh.reset(7, "held_out")
    assert said["equation"] == str(fresh.scene.equation)
    assert said["cards"] == [card.number for card in fresh.scene.cards]
    ours = artist.draw(world.scene(), 120, 160).astype(int)
    assert np.abs(ours - fresh.render(120, 160).astype(int)).mean() < 8
    with pytest.raises(ValueError, match="found the split 'x'"):
        world.tell({"reset": 1, "split": "x"})


def test_both_arms_and_the_camera_of_the_rig_meet_in_one_world():
    loaded = rig.load("tabletop")
    world = {"world": f"test-{uuid.uuid4().hex[:16]}"}
    left, right = (registry.create("arms", arm.driver, {**arm.options, **world}) for arm in loaded.arms.values())
    camera = registry.create("cameras", "tabletop", {**loaded.cameras["top"].options, **world})
    left.open(500)
    right.open(500)
    camera.open(240, 320, 30.0)
    assert len(left.axes) == len(left.state().position) == 7
    home = np.array(loaded.arms["left"].home)
    assert np.abs(home - left.state().position).max() < 0.1
    first = camera.read(5.0).image.astype(int).copy()
    target = home.copy()
    target[0] -= 0.6
    end = time.monotonic() + 10
    while abs(left.state().position[0] - target[0]) > 1e-3:
        left.command(target)
        assert time.monotonic() < end
    camera.read(5.0)
    moved = np.abs(camera.read(5.0).image.astype(int) - first).max(axis=2) > 60
    assert moved[:, :160].sum() > 50
    assert right.tell(result=True)["placed"] is None
    for device in (left, right, camera):
        device.close()
