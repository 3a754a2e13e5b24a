"""A policy over many queries: drafts change no bit, an old reasoning is used only where the operator asked for it."""

import os

import numpy as np
import pytest
from support import faults

from chatvla_edge.export.lower.onnxruntime import PRECISIONS
from chatvla_edge.runtime.engines.onnxruntime import QUIET, OnnxRuntimeEngine, Threads
from chatvla_edge.runtime.policy import Policy, ReasoningSettings

CAMERA = faults.ROBOT("top").cameras[0]
INSTRUCTIONS = ("Pick the card.", "Solve 3 + 4 and point at the answer.", "Put the toy to the right.")
SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return faults.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", layers=2, sharpness=4)


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {name: faults.export(checkpoint, folder / name, name, gates=False) for name in PRECISIONS}


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles["fp32"]


def policy(bundle, **reasoning):
    return Policy(bundle.path, bundle.manifest, Threads(1), ReasoningSettings(**reasoning))


def observe(seed):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (CAMERA.height, CAMERA.width, 3), dtype=np.uint8)
    return [frame], rng.standard_normal(14).astype(np.float32)


def ask(policy, seed, instruction=INSTRUCTIONS[0], at=0.0, **options):
    frames, state = observe(seed)
    return policy.query(frames, state, instruction, policy.noise(seed), observed_ns=int(at * SECOND), **options)


# ------------------------------------------------------------------------------------------------------------ drafts


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_hundred_queries_with_drafts_are_two_hundred_plain_ones(bundles, precision):
    """Token for token, chunk bit for bit: pictures drift and jump, states and instructions change, drafts are the
    previous reasoning.
    """
    asked = policy(bundles[precision])
    rng = np.random.default_rng(5)
    frames, state = observe(0)
    draft: list[int] = []
    passes, texts, missed = [0, 0], set(), 0
    for index in range(200):
        if index % 10 == 9:
            frames, _ = observe(index)  # another scene
        else:
            drift = rng.integers(-2, 3, frames[0].shape)
            frames = [np.clip(frames[0].astype(np.int16) + drift, 0, 255).astype(np.uint8)]
        state = (state + 0.05 * rng.standard_normal(14)).astype(np.float32)
        instruction = INSTRUCTIONS[index // 25 % len(INSTRUCTIONS)]
        noise = asked.noise(index)
        plain = asked.query(frames, state, instruction, noise)
        tried = asked.query(frames, state, instruction, noise, draft=draft)
        assert tried.token_ids == plain.token_ids, index
        assert tried.normalized.tobytes() == plain.normalized.tobytes(), index
        assert tried.chunk.tobytes() == plain.chunk.tobytes(), index
        assert tried.reasoning_mean.tobytes() == plain.reasoning_mean.tobytes(), index
        np.testing.assert_array_equal(tried.routing, plain.routing)
        passes[0] += plain.passes
        passes[1] += tried.passes
        texts.add(tuple(plain.token_ids))
        missed += bool(draft) and tried.passes > 1
        draft = plain.token_ids
    # Drafts were taken, drafts were wrong, and the model had something to say, or nothing was shown.
    assert passes[1] < 0.9 * passes[0]
    assert missed >= 10
    assert len(texts) >= 10


@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_this_machine_a_row_has_the_same_bits_however_many_stand_beside_it(bundles, precision):
    asked = policy(bundles[precision])
    for seed in range(3):
        frames, _ = observe(seed)
        seen, words = asked.see(frames), ask(asked, seed).token_ids
        together, said, _ = asked.follow(INSTRUCTIONS[0], seen, np.asarray(words))
        hidden, tokens = asked.follow_by_rows(INSTRUCTIONS[0], seen, np.asarray(words))
        assert hidden.tobytes() == together[-len(words) :].tobytes()
        np.testing.assert_array_equal(tokens, said)
        np.testing.assert_array_equal(tokens, words)


# --------------------------------------------------------------------------------------------- the operator's trade


def ages(answers):
    return [(answer.reasoning_age_queries, answer.reasoning_age_s) for answer in answers]


def test_unless_asked_every_query_reasons(bundle):
    asked = policy(bundle)
    answers = [ask(asked, seed, at=seed) for seed in range(3)]
    assert ages(answers) == [(0, 0.0)] * 3
    fresh = [ask(policy(bundle), seed) for seed in range(3)]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in fresh]
    assert len({tuple(answer.token_ids) for answer in answers}) > 1, "scenes that all say the same show nothing"


def test_every_third_query_reasons_and_each_answer_tells_the_age(bundle):
    asked = policy(bundle, every_n_queries=3)
    answers = [ask(asked, seed, at=0.25 * seed) for seed in range(7)]
    assert ages(answers) == [(0, 0.0), (1, 0.25), (2, 0.5), (0, 0.0), (1, 0.25), (2, 0.5), (0, 0.0)]
    for seed, answer in enumerate(answers):
        own = ask(policy(bundle), seed)
        made = answers[seed - answer.reasoning_age_queries]
        assert answer.token_ids == made.token_ids
        assert answer.text == made.text
        assert answer.reasoning_mean.tobytes() == made.reasoning_mean.tobytes()
        # What it sees is its own all the same, to the bit.
        assert answer.prompt_mean.tobytes() == own.prompt_mean.tobytes()
        assert answer.normalized.tobytes() == own.normalized.tobytes() or answer.reasoning_age_queries
        if answer.reasoning_age_queries:
            assert (answer.passes, answer.accepted) == (1, 0)
            assert answer.routing.sum() < own.routing.sum(), "no row of the text was fed"


def test_a_reasoning_is_used_until_it_is_too_old(bundle):
    asked = policy(bundle, max_age_s=1.0)
    answers = [ask(asked, 1, at=at) for at in (10.0, 10.6, 11.0, 11.25, 11.5)]
    assert ages(answers) == [(0, 0.0), (1, 0.6), (2, 1.0), (0, 0.0), (1, 0.25)]


def test_both_bounds_hold_where_both_are_given(bundle):
    asked = policy(bundle, max_age_s=1.0, every_n_queries=2)
    answers = [ask(asked, 1, at=at) for at in (0.0, 0.5, 0.75, 2.0)]
    assert [age for age, _ in ages(answers)] == [0, 1, 0, 0]


def test_another_instruction_is_always_reasoned_about(bundle):
    asked = policy(bundle, every_n_queries=100)
    first = ask(asked, 1)
    other = ask(asked, 1, INSTRUCTIONS[1])
    assert ages([first, other, ask(asked, 2, INSTRUCTIONS[1]), ask(asked, 2)]) == [(0, 0), (0, 0), (1, 0), (0, 0)]


def test_a_forgotten_reasoning_is_not_used(bundle):
    asked = policy(bundle, every_n_queries=100)
    ask(asked, 1)
    asked.forget()
    assert ask(asked, 2).reasoning_age_queries == 0


def test_an_observation_from_before_the_reasoning_gets_its_own(bundle):
    asked = policy(bundle, every_n_queries=100)
    ask(asked, 1, at=5.0)
    assert ages([ask(asked, 1, at=4.9), ask(asked, 1, at=5.0)]) == [(0, 0.0), (1, pytest.approx(0.1))]


def test_a_query_that_fails_makes_nothing_older(bundle):
    asked = policy(bundle, every_n_queries=3)
    ask(asked, 1)
    with pytest.raises(ValueError, match="the state must be 14"):
        asked.query(observe(1)[0], np.zeros(3, np.float32), INSTRUCTIONS[0], asked.noise(0))
    assert ask(asked, 1).reasoning_age_queries == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_queries": 0}, "at least 1"),
        ({"max_age_s": -1.0}, "finite number of seconds"),
        ({"max_age_s": float("nan")}, "finite number of seconds"),
        ({"max_age_s": float("inf")}, "finite number of seconds"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReasoningSettings(**settings)


# ----------------------------------------------------------------------------------------------------------- threads


def engines(policy):
    return [*policy._vision.values(), policy._language.engine, policy._condition, policy._denoise]


def test_no_engine_of_a_policy_spins(bundle):
    loaded = engines(policy(bundle))
    assert len(loaded) == 4
    for engine in loaded:
        assert {name: engine.setting(name) for name in QUIET} == {
            "session.intra_op.allow_spinning": "0",
            "session.inter_op.allow_spinning": "0",
        }


def cpu_seconds(threads):
    def spent(thread):
        fields = open(f"/proc/self/task/{thread}/stat").read().rpartition(")")[2].split()  # noqa: PTH123, SIM115
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    return sum(spent(thread) for thread in threads)


def tasks():
    return {int(name) for name in os.listdir("/proc/self/task")}  # noqa: PTH208


def test_waiting_threads_use_no_processor_time(bundle):
    """What a spinning worker would burn, by the kernel's account of the workers alone."""
    import time

    before = tasks()
    asked = Policy(bundle.path, bundle.manifest, Threads(2))
    workers = tasks() - before
    assert len(workers) == 4, "one beside the caller for each engine"
    ask(asked, 1)
    worked = cpu_seconds(workers)
    time.sleep(0.5)
    assert cpu_seconds(workers) - worked <= 0.05


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor leaves nothing to choose")
def test_threads_run_where_the_rig_says(bundle):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    threads = Threads.on([second, first])
    before = tasks()
    asked = Policy(bundle.path, bundle.manifest, threads)
    workers = tasks() - before
    assert [os.sched_getaffinity(worker) for worker in workers] == [{first}] * 4
    whole = os.sched_getaffinity(0)
    try:
        threads.pin()
        assert os.sched_getaffinity(0) == {second}
        pinned = ask(asked, 1)
    finally:
        os.sched_setaffinity(0, whole)
    assert pinned.normalized.tobytes() == ask(policy(bundle), 1).normalized.tobytes()


def test_processors_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"found the processors \[0, 4096\] for 2 threads"):
        Threads.on([0, 4096])
    with pytest.raises(ValueError, match="name one per thread"):
        Threads(3, (0, 1))
    with pytest.raises(ValueError, match="at least one thread"):
        Threads(0)


def test_a_processor_that_may_not_be_used_is_an_error_not_a_log_line(bundle, monkeypatch):
    """ONNX Runtime only logs that it could not pin a thread."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4096)
    monkeypatch.setattr("chatvla_edge.runtime.engines.onnxruntime.PINNED_WITHIN_S", 0.1)
    missing = 4000
    path = bundle.path / bundle.manifest.stages.condition.file
    with pytest.raises(OSError, match=rf"were to run on the processors \[{missing}\], they run on"):
        OnnxRuntimeEngine(path, Threads.on([0, missing]))
