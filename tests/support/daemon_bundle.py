"""One small bundle for all daemons of the tests."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.statistics import load_statistics
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.exporter import Settings, export
from chatvla_edge.export.robots import load


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A tiny policy for two ARX arms: random weights, whose actions stay within 0.04 rad of a pose of both arms."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("policy")
    spec, layout, _ = PRESETS["tiny"]
    synthesize(folder / "checkpoint", spec, layout, dtype=torch.float32)
    pose = np.array([0.2, 0.7, 0.7, 0.2, 0.2, 0.2, 0.05] * 2, np.float32)
    span = np.array(([0.04] * 6 + [0.01]) * 2, np.float32)
    known = load_statistics(folder / "checkpoint" / "dataset_stats.json")
    calm = replace(known, action_min=pose - span, action_max=pose + span)
    (folder / "checkpoint" / "dataset_stats.json").write_text(calm.to_json())
    settings = Settings(
        target="cpu", precision="int8", robot=load("arx_r5_bimanual"), max_reasoning=12, probes=1, gates=False
    )
    export(open_checkpoint(folder / "checkpoint"), folder / "bundle", settings, lambda _name, _count: None)
    return folder / "bundle"
