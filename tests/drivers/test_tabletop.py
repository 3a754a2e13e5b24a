"""The simulated table: scenes from seeds, splits that share nothing, arms, cards, pictures."""

import numpy as np
import pytest

from chatvla_edge.drivers.sim.digits import HELD_OUT, handwritten, printed
from chatvla_edge.drivers.sim.planar_arm import JOINTS, LOWER, UPPER
from chatvla_edge.drivers.sim.tabletop import (
    ARMS,
    CARDS,
    CLOSED,
    HOME,
    JOINT_SPEED,
    OPEN,
    SPLITS,
    Tabletop,
    equations,
    home_state,
    split_equations,
)


def _world(seed, split="in_domain"):
    world = Tabletop()
    world.reset(seed, split)
    return world


def _go(world, arm, place, opening, seconds=1.5):
    """Command an arm's hand to a place with a gripper opening, for so long."""
    command = world.state.astype(float)
    command[7 * arm : 7 * arm + JOINTS] = ARMS[arm].joints(*place)
    command[7 * arm + 6] = opening
    for _ in range(round(seconds / 0.02)):
        world.step(command, 0.02)


def _pick(world, card):
    arm = 0 if card == 0 else 1
    place = world.scene.cards[card].x, world.scene.cards[card].y
    _go(world, arm, place, OPEN)
    _go(world, arm, place, CLOSED, 0.5)
    return arm


def test_a_seed_is_a_world():
    first, again, other = _world(3), _world(3), _world(4)
    assert np.array_equal(first.render(240, 320), again.render(240, 320))
    assert np.array_equal(first.state, again.state)
    assert not np.array_equal(first.render(240, 320), other.render(240, 320))


def test_two_pictures_of_one_moment_differ_by_sensor_noise_only():
    world = _world(5)
    first, second = (world.render(240, 320).astype(int) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.abs(first - second).mean() < 10


@pytest.mark.parametrize("highest", [9, 81])
def test_held_out_equations_are_a_fifth_and_disjoint(highest):
    kept, held = split_equations(highest, held_out=False), split_equations(highest, held_out=True)
    assert not set(kept) & set(held)
    assert set(kept) | set(held) == set(equations(highest))
    assert len(held) == len(equations(highest)) // 5


def test_handwriting_of_the_splits_is_disjoint():
    known = {image.tobytes() for digit in range(10) for image in handwritten(digit, held_out=False)}
    held = [image.tobytes() for digit in range(10) for image in handwritten(digit, held_out=True)]
    assert len(held) == HELD_OUT
    assert not known & set(held)


def test_splits_show_what_they_say():
    for seed in range(40):
        in_domain, writers, held_out = (_world(seed, split).scene.equation for split in SPLITS)
        assert in_domain in split_equations(9, held_out=False)
        assert writers in split_equations(9, held_out=False)
        assert held_out in split_equations(9, held_out=True)


def test_one_card_is_the_answer():
    for seed in range(100):
        scene = _world(seed).scene
        numbers = [card.number for card in scene.cards]
        assert len(set(numbers)) == 3
        assert numbers[scene.right_place] == scene.equation.answer
        assert all(0 <= number <= 9 for number in numbers)


def test_every_place_is_right_about_as_often():
    places = [_world(seed).scene.right_place for seed in range(300)]
    assert np.bincount(places, minlength=3).min() > 70


@pytest.mark.parametrize("arm", [0, 1])
def test_joints_and_hand_agree_within_the_ranges_of_the_arm(arm):
    rng = np.random.default_rng(arm)
    x, y = ARMS[arm].base[0] + rng.uniform(-0.25, 0.35, 500), rng.uniform(-0.2, 0.22, 500)
    q = ARMS[arm].joints(x, y)
    assert np.allclose(ARMS[arm].hand(q), np.stack([x, y], axis=-1), atol=1e-9)
    near = np.hypot(x - HOME[arm][0], y - HOME[arm][1]) < 0.25
    assert (q[near] >= LOWER).all()
    assert (q[near] <= UPPER).all()
    assert ARMS[arm].heading(q[0]) == pytest.approx(0.0)


def test_a_gripper_that_closes_on_a_card_takes_it_along_and_lays_it_on_the_board():
    world = _world(7)
    card = world.scene.right_place
    arm = _pick(world, card)
    assert world.held[arm] == card
    assert [index for _, index in world.picks] == [card]
    _go(world, arm, tuple(world.slot), CLOSED)
    assert (world.scene.cards[card].x, world.scene.cards[card].y) == pytest.approx(tuple(world.hands()[arm]))
    assert world.placed is None
    _go(world, arm, tuple(world.slot), OPEN, 0.5)
    assert world.placed == card
    assert world.held == (None, None)


def test_a_gripper_that_closes_beside_the_cards_holds_nothing():
    world = _world(8)
    _go(world, 0, (CARDS[0][0], 0.08), OPEN)
    _go(world, 0, (CARDS[0][0], 0.08), CLOSED, 0.5)
    assert world.held == (None, None)
    assert world.picks == []


def test_a_card_let_go_beside_the_board_is_not_placed():
    world = _world(9)
    arm = _pick(world, 1)
    _go(world, arm, (0.0, -0.15), CLOSED)
    _go(world, arm, (0.0, -0.15), OPEN, 0.5)
    assert world.held == (None, None)
    assert world.placed is None


def test_arms_move_no_faster_than_they_can():
    world = _world(10)
    before = world.state.astype(float)
    world.step(before + 1.0, 0.01)
    moved = world.state - before
    assert np.abs(np.delete(moved, [6, 13])).max() == pytest.approx(JOINT_SPEED * 0.01, rel=1e-4)


@pytest.mark.parametrize("command", [np.zeros(13), np.full(14, np.nan)])
def test_a_command_that_is_none_is_refused(command):
    with pytest.raises(ValueError, match="14 finite numbers"):
        _world(0).step(command, 0.01)


@pytest.mark.parametrize("size", [(240, 320), (480, 640), (120, 168)])
def test_pictures_come_in_any_size(size):
    frame = _world(11).render(*size)
    assert frame.shape == (*size, 3)
    assert frame.dtype == np.uint8
    assert frame.std() > 20


def test_a_hand_is_drawn_where_the_joints_say():
    world = _world(12)
    without = world.render(240, 320).astype(int)
    state = home_state()
    state[:JOINTS] = ARMS[0].joints(-0.1, 0.06)
    world.put(state)
    changed = np.abs(world.render(240, 320).astype(int) - without).max(axis=2) > 60
    row, column = round((0.3 - 0.035) / 0.6 * 240), round((-0.1 + 0.4) / 0.8 * 320)  # the fingers' own stretch
    assert changed[row - 8 : row + 9, column - 24 : column + 25].sum() > 40
    assert not changed[:40].any()


def test_numbers_are_printed_figure_beside_figure():
    assert printed(7).shape == (7, 5)
    assert printed(42).shape == (7, 11)
    assert np.array_equal(printed(42)[:, :5], printed(4))
