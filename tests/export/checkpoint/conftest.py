import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def weights():
    """A few tensors of the dtypes that public checkpoints hold."""
    generator = torch.Generator().manual_seed(3)
    return {
        "model.embed_tokens.weight": torch.randn(7, 4, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(4, generator=generator),
        "policy_head.x_embedder.bias": torch.randn(3, generator=generator).half(),
        "expert_traffic": torch.arange(6).reshape(2, 3),
        "mask": torch.tensor([True, False, True]),
        "step": torch.tensor(12),
        "nothing": torch.empty(0, 4),
    }


@pytest.fixture
def sharded(tmp_path, weights):
    """The same in two shards behind an index; returns the directory."""
    directory = tmp_path / "checkpoint-100"
    directory.mkdir()
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, directory / shard, metadata={"format": "pt"})
    write_index(directory, {name: shard for shard, members in shards.items() for name in members})
    return directory


def write_index(directory: Path, table: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
