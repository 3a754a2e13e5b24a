"""Config, tokenizer and statistics come from the checkpoint's own folder, have a plausible size, and fit the model."""

import json

import pytest

from chatvla_edge.export.checkpoint import statistics, tokenizer
from chatvla_edge.export.checkpoint.errors import CheckpointError
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize


@pytest.fixture
def checkpoint(tmp_path):
    spec, layout, _ = PRESETS["tiny"]
    synthesize(tmp_path / "c", spec, layout)
    return tmp_path / "c"


def use(directory):
    opened = open_checkpoint(directory)
    opened.normalization()
    opened.prompt()


FILES = ["config.json", "tokenizer.json", "dataset_stats.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leaves_the_checkpoint_is_refused(checkpoint, tmp_path, name):
    outside = tmp_path / "outside.json"
    (checkpoint / name).rename(outside)
    (checkpoint / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"a link to .*outside\.json"):
        use(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_link_inside_the_checkpoint_is_followed(checkpoint, name):
    (checkpoint / name).rename(checkpoint / "kept.json")
    (checkpoint / name).symlink_to("kept.json")
    use(checkpoint)


def test_links_of_a_hub_cache_lead_to_its_blobs(checkpoint, tmp_path):
    blobs = tmp_path / "hub/blobs"
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "hub/snapshots/main"
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    use(snapshot)


@pytest.mark.parametrize(
    ("module", "name"), [(tokenizer, "tokenizer.json"), (statistics, "dataset_stats.json")], ids=["tokens", "stats"]
)
def test_a_file_larger_than_any_of_its_kind_is_refused_unread(checkpoint, module, name, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", (checkpoint / name).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{name}: found \d+ bytes"):
        use(checkpoint)


def with_tokens(checkpoint, edit):
    table = json.loads((checkpoint / "tokenizer.json").read_text())
    edit(table)
    (checkpoint / "tokenizer.json").write_text(json.dumps(table))


def test_a_token_beyond_the_embedding_is_refused(checkpoint):
    with_tokens(checkpoint, lambda table: table["model"]["vocab"].update({"far": 262, "farther": 400}))
    with pytest.raises(CheckpointError, match=r"found the id 262 and 1 more beyond it; expected ids .* below 262"):
        use(checkpoint)


def test_two_tokens_of_one_id_are_refused(checkpoint):
    with_tokens(checkpoint, lambda table: table["model"]["vocab"].update({"again": 7}))
    with pytest.raises(CheckpointError, match="two tokens of id 7"):
        use(checkpoint)
