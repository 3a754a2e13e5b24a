"""The chunk mailbox and the committed-prefix slot."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime.mailbox import ChunkMailbox, PrefixSlot
from chatvla_edge.runtime.realtime import now_ns
from chatvla_edge.runtime.slots import SlotBusyError

H, A = 50, 14


def policy_and_servo() -> tuple[ChunkMailbox, ChunkMailbox]:
    servo = ChunkMailbox.create("chunks", H, A)
    return ChunkMailbox.attach(servo.fd, H, A, write=True), servo


def post(policy: ChunkMailbox, actions: np.ndarray, epoch: int = 1, tau: float = 0.0) -> int:
    return policy.publish(actions, epoch=epoch, tau_observation=tau, first_step=-1, dt=0.02, captured_ns=77)


@settings(deadline=None)  # a shared machine stalls for longer than any example takes
@given(
    st.integers(1, H),
    st.integers(0, 2**64 - 1),
    st.floats(allow_nan=False),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(0, 1),
)
def test_a_chunk_arrives_as_it_was_posted(n, epoch, tau, first_step, dt):
    policy, servo = policy_and_servo()
    actions = np.random.default_rng(n).normal(size=(n, A))
    actions[0, 0] = np.nan  # judging the numbers is not the mailbox's business
    before = now_ns()
    assert (
        policy.publish(
            actions, epoch=epoch, tau_observation=tau, first_step=first_step, dt=dt, captured_ns=before - 300_000_000
        )
        == 1
    )
    chunk = servo.take()
    assert chunk is not None
    assert (chunk.sequence, chunk.epoch, chunk.tau_observation, chunk.first_step, chunk.dt) == (
        1, epoch, tau, first_step, dt,
    )  # fmt: skip
    assert chunk.captured_ns == before - 300_000_000
    assert before <= chunk.published_ns <= now_ns()
    assert chunk.actions.shape == (n, A)
    assert chunk.actions.tobytes() == actions.tobytes()


def test_an_empty_mailbox_holds_nothing():
    _, servo = policy_and_servo()
    assert servo.take() is None


def test_the_newest_chunk_wins_and_is_consumed_once():
    policy, servo = policy_and_servo()
    for value in (1.0, 2.0, 3.0):
        post(policy, np.full((H, A), value))
    chunk = servo.take(seen=0)
    assert chunk.sequence == 3
    assert (chunk.actions == 3.0).all()
    assert servo.take(seen=chunk.sequence) is None
    post(policy, np.full((8, A), 4.0))
    chunk = servo.take(seen=chunk.sequence)
    assert (chunk.sequence, chunk.actions.shape) == (4, (8, A))
    assert (chunk.actions == 4.0).all()  # nothing of the longer chunk before it


def test_a_restarted_policy_continues_the_chunk_sequence():
    policy, servo = policy_and_servo()
    post(policy, np.ones((H, A)))
    del policy
    policy = ChunkMailbox.attach(servo.fd, H, A, write=True)
    assert post(policy, np.ones((H, A))) == 2


def test_a_chunk_that_does_not_fit_is_refused_and_the_last_one_stays():
    policy, servo = policy_and_servo()
    post(policy, np.ones((H, A)))
    for shape in ((H + 1, A), (H, A + 1), (H, A - 1)):
        with pytest.raises(ValueError, match=rf"chunks: a chunk of shape \({shape[0]}, {shape[1]}\); .* \(50, 14\)"):
            post(policy, np.zeros(shape))
    with pytest.raises(ValueError, match="an empty chunk"):
        post(policy, np.zeros((0, A)))
    assert servo.take().sequence == 1
    with pytest.raises(PermissionError):
        post(servo, np.ones((H, A)))


@pytest.mark.parametrize("n", [0, -1, H + 1, 2**31 - 1])
def test_a_damaged_header_never_says_how_much_the_servo_copies(n):
    policy, servo = policy_and_servo()
    post(policy, np.ones((H, A)))
    stride = -(-(3 + 5 + H * A) // 8) * 64
    os.pwrite(servo.fd, n.to_bytes(4, "little", signed=True), 128 + stride + 24 + 36)  # rows of the cell of number 1
    with pytest.raises(SlotBusyError):
        servo.take()


def test_both_sides_agree_on_horizon_and_dimension():
    _, servo = policy_and_servo()
    with pytest.raises(ValueError, match=r"geometry \(50, 14, 3\) .* geometry \(14, 50, 3\)"):
        ChunkMailbox.attach(servo.fd, A, H)
    with pytest.raises(ValueError, match="at least one action"):
        ChunkMailbox.create("none", 0, A)
    with pytest.raises(ValueError, match="at least one action"):
        PrefixSlot.create("none", H, 0)


def test_a_prefix_arrives_with_its_mask_and_time():
    policy = PrefixSlot.create("prefix", H, A)
    assert policy.read() is None
    servo = PrefixSlot.attach(policy.fd, H, A, write=True)
    actions, mask = np.random.default_rng(1).normal(size=(H, A)), np.linspace(1, 0, H)
    assert servo.publish(actions, mask, epoch=3, tau=12.34, dt=0.02) == 1
    prefix = policy.read()
    assert (prefix.sequence, prefix.epoch, prefix.tau, prefix.dt) == (1, 3, 12.34, 0.02)
    assert (prefix.actions == actions).all()
    assert (prefix.mask == mask).all()
    assert prefix.published_ns == prefix.captured_ns


def test_a_prefix_is_of_the_full_horizon():
    policy = PrefixSlot.create("prefix", H, A)
    servo = PrefixSlot.attach(policy.fd, H, A, write=True)
    for actions, mask in (((H - 1, A), H), ((H, A + 1), H), ((H, A), H - 1)):
        with pytest.raises(ValueError, match=r"prefix: actions .* expected"):
            servo.publish(np.zeros(actions), np.zeros(mask), epoch=0, tau=0.0, dt=0.1)
    with pytest.raises(PermissionError):
        policy.publish(np.zeros((H, A)), np.zeros(H), epoch=0, tau=0.0, dt=0.1)
    os.pwrite(policy.fd, b"\x01", 64)  # latest says 1, but its cell was never written
    with pytest.raises(SlotBusyError):
        policy.read()
