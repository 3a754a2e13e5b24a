"""Statistics: read from what the training scripts write, checked, and kept as JSON to the last bit."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chatvla_edge.export.checkpoint.errors import CheckpointError
from chatvla_edge.export.checkpoint.statistics import (
    KEYS,
    find_statistics,
    load_statistics,
    parse_json,
    parse_statistics,
)


def table(A=10, S=7, **changes):
    rng = np.random.default_rng(1)
    low = rng.normal(size=A).astype(np.float32)
    return {
        "action_mean": low + 1,
        "action_std": np.full(A, 0.5, np.float32),
        "action_min": low,
        "action_max": low + 2,
        "qpos_mean": rng.normal(size=S).astype(np.float32),
        "qpos_std": np.full(S, 0.25, np.float32),
        "example_qpos": rng.normal(size=(30, S)),
        **changes,
    }


def save(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_the_file_of_a_training_run_is_read_as_it_was_written(tmp_path, protocol):
    value = table()
    statistics = load_statistics(save(tmp_path / "dataset_stats.pkl", value, protocol))
    assert (statistics.action_dim, statistics.state_dim) == (10, 7)
    for key in KEYS:
        assert getattr(statistics, key).dtype == np.float32
        np.testing.assert_array_equal(getattr(statistics, key), value[key])


def test_statistics_cannot_be_changed_by_whoever_reads_them():
    statistics = parse_statistics(table(), "x")
    with pytest.raises(ValueError, match="read-only"):
        statistics.action_min[0] = 0


@given(hnp.arrays(np.float32, (2, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_json_gives_back_the_same_float32_bits(values):
    statistics = parse_statistics(table(3, 3, action_mean=values[0], qpos_mean=values[1]), "x")
    again = parse_json(statistics.to_json(), "y")
    assert again == statistics
    assert again.action_mean.tobytes() == statistics.action_mean.tobytes()


def test_the_json_file_is_read_back(tmp_path):
    statistics = parse_statistics(table(), "x")
    (tmp_path / "dataset_stats.json").write_text(statistics.to_json())
    assert load_statistics(tmp_path / "dataset_stats.json") == statistics


def test_float64_is_rounded_to_float32():
    assert parse_statistics(table(action_mean=np.full(10, 0.1)), "x").action_mean[0] == np.float32(0.1)


def test_a_task_is_chosen_by_name():
    tasks = {"fold_shirt": table(), "others": table(action_mean=np.zeros(10, np.float32))}
    assert not parse_statistics(tasks, "x", "others").action_mean.any()


@pytest.mark.parametrize("task", [None, "clean_table"])
def test_a_task_that_is_not_chosen_or_not_there_is_refused_with_those_that_are(task):
    with pytest.raises(CheckpointError, match="for the tasks fold_shirt, others"):
        parse_statistics({"fold_shirt": table(), "others": table()}, "x", task)


def test_a_task_for_a_file_without_tasks_is_refused():
    with pytest.raises(CheckpointError, match="without task 'fold_shirt'"):
        parse_statistics(table(), "x", "fold_shirt")


BAD = np.ones(10, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_mean": BAD[:9]}, r"lengths \{'action_mean': 9, 'action_std': 10"),
        ({"qpos_std": np.ones(6, np.float32)}, "lengths"),
        ({"action_mean": np.ones((2, 5), np.float32)}, r"'action_mean': found float32 \[2, 5\]"),
        ({"action_mean": np.array(1.0)}, r"'action_mean': found float64 \[\]"),
        ({"action_mean": np.ones(0)}, "'action_mean'"),
        ({"action_mean": np.ones(10, int)}, "'action_mean': found int64"),
        ({"action_mean": "1"}, "'action_mean': found a str"),
        ({"action_mean": [True] * 10}, "'action_mean': found a list"),
        ({"action_mean": [10**400] * 10}, "'action_mean'"),
        ({"action_mean": np.full(10, np.nan)}, r"'action_mean': found NaN or infinity at \[0, 1"),
        ({"action_mean": np.full(10, 1e300)}, "'action_mean': found NaN or infinity"),
        ({"action_std": 0 * BAD}, "'action_std': found components .* not above zero"),
        ({"qpos_std": -np.ones(7, np.float32)}, "'qpos_std': found components"),
        ({"action_min": 100 * BAD}, "'action_max': found components .* not above action_min"),
        ({"action_q99": BAD}, "the unknown key 'action_q99'"),
    ],
)
def test_statistics_that_would_make_wrong_numbers_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        parse_statistics(table(**changes), "dataset_stats.pkl")


def test_a_missing_key_is_refused_by_name():
    value = table()
    del value["qpos_mean"]
    with pytest.raises(CheckpointError, match="found no qpos_mean"):
        parse_statistics(value, "x")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"schema": 2}', '{"schema": 1}', "[" * 100_000])
def test_a_json_that_is_no_statistics_is_refused(text):
    with pytest.raises(CheckpointError, match="x: found"):
        parse_json(text, "x")


def test_a_json_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="no UTF-8"):
        load_statistics(tmp_path / "a.json")


def test_dimensions_that_are_not_the_models_are_refused_with_both():
    with pytest.raises(CheckpointError, match="found 10 action and 7 state components; expected 14 and 14"):
        parse_statistics(table(), "x").check_dims(14, 14)
    parse_statistics(table(), "x").check_dims(10, 7)


def test_components_that_never_moved_are_noted():
    std = np.full(7, 0.25, np.float32)
    std[[2, 6]] = np.float32(1e-2)
    notes = parse_statistics(table(qpos_std=std), "x").notes
    assert notes == ("qpos_std: components [2, 6] are at the floor of 0.01, so they hardly moved in training.",)


@pytest.mark.parametrize(
    ("file", "checkpoint"),
    [
        ("run/dataset_stats.pkl", "run/checkpoint-500"),
        ("run/checkpoint-500/dataset_stats.pkl", "run/checkpoint-500"),
        ("run/dataset_stats.pkl", "run/checkpoint-500/checkpoint-500"),
        ("run/dataset_stats.json", "run/checkpoint-500"),
        ("run/dataset_stats.pkl", "run/checkpoint-500/model.safetensors"),
    ],
)
def test_statistics_are_found_where_training_runs_put_them(tmp_path, file, checkpoint):
    checkpoint, file = tmp_path / checkpoint, tmp_path / file
    (checkpoint if not checkpoint.suffix else checkpoint.parent).mkdir(parents=True)
    if checkpoint.suffix:
        checkpoint.touch()
    file.touch()
    assert find_statistics(checkpoint) == file


def test_statistics_of_another_run_further_up_are_not_taken(tmp_path):
    (tmp_path / "runs" / "qwen2" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "runs" / "dataset_stats.pkl").touch()
    assert find_statistics(tmp_path / "runs" / "qwen2" / "checkpoint-1") is None


def test_a_json_beside_a_pickle_is_preferred(tmp_path):
    for name in ("dataset_stats.pkl", "dataset_stats.json"):
        (tmp_path / name).touch()
    assert find_statistics(tmp_path).name == "dataset_stats.json"


def test_the_json_holds_plain_numbers_under_the_keys_of_the_pickle():
    value = json.loads(parse_statistics(table(), "x").to_json())
    assert set(value) == {"schema", *KEYS}
    assert len(value["action_min"]) == 10
