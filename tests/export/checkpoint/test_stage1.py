"""Stage-1 ScaleDP heads: found in their nested torch file, condition embedding dropped, trunk identical."""

import pytest
import torch
from support import tiny

from chatvla_edge.export.checkpoint.errors import CheckpointError
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.publish import public_tensors
from chatvla_edge.export.checkpoint.stage1 import open_stage1_head

POLICY = tiny.policy(head_spec=tiny.head(reasoning=None))


def stage1(model, split: bool) -> dict[str, torch.Tensor]:
    """The state dict of a stage-1 run that trained this head behind an encoder of its own."""
    parameters = {name: value for name, value in model.named_parameters() if name.startswith("head.")}
    layout = Layout(head_qkv="split" if split else "fused")
    names = {
        f"policy.noise_pred_net.{name.removeprefix('policy_head.')}": value.clone()
        for name, value in public_tensors(parameters, layout)
    }
    names["policy.noise_pred_net.cond_obs_emb.weight"] = torch.randn(32, 1000)
    names["policy.noise_pred_net.norm_after_pool.weight"] = torch.randn(1000)
    names["policy.obs_encoder.backbone.conv1.weight"] = torch.randn(4, 3, 7, 7)
    return names


@pytest.fixture
def head_file(tmp_path):
    model = tiny.model(POLICY)
    trained, averaged = stage1(model, split=True), {k: v * 2 for k, v in stage1(model, split=True).items()}
    torch.save({"nets": {"nets": trained, "ema": averaged}, "epoch": 3}, tmp_path / "head.ckpt")
    return tmp_path / "head.ckpt"


def test_the_trunk_carries_over_to_identical_outputs(head_file):
    model = tiny.model(POLICY)
    other = tiny.model(POLICY, seed=9)
    found = open_stage1_head(head_file, heads=4)
    for name, entry in found.entries.items():
        other.get_parameter(name).copy_(entry.load())
    # What conditions the head is not in the file: give both the same, then nothing may differ.
    for name in ("cond_obs_emb", "norm_after_pool"):
        getattr(other.head, name).load_state_dict(getattr(model.head, name).state_dict())
    conditions = model.head.condition(torch.randn(1, 64), torch.randn(1, 64), torch.randn(1, 14))
    noise = torch.randn(1, 10, 14)
    expected, actual = (m.head.sample(noise, conditions, POLICY.sampler) for m in (model, other))
    assert torch.equal(actual, expected)


def test_geometry_is_read_off_the_tensors(head_file):
    head = open_stage1_head(head_file, heads=4).head
    assert (head.depth, head.width, head.mlp_width, head.horizon, head.action_dim) == (4, 32, 128, 10, 14)


def test_the_moving_average_is_read_on_demand(head_file):
    plain, averaged = (open_stage1_head(head_file, weights, heads=4) for weights in ("nets", "ema"))
    name = "head.blocks.1.attn.qkv.weight"
    assert torch.equal(averaged.entries[name].load(), 2 * plain.entries[name].load())


def test_what_is_dropped_is_listed_with_its_reason(head_file):
    ignored = {entry.name: entry.reason for entry in open_stage1_head(head_file, heads=4).ignored}
    assert "encoder" in ignored["policy.obs_encoder.backbone.conv1.weight"]
    assert "learns its own" in ignored["policy.noise_pred_net.cond_obs_emb.weight"]


def test_an_unpublished_size_needs_its_attention_heads(head_file):
    with pytest.raises(CheckpointError, match="attention heads"):
        open_stage1_head(head_file)


@pytest.mark.parametrize("edit", ["missing", "extra", "misshapen"])
def test_a_damaged_head_is_refused_by_the_tensors_name(head_file, edit):
    content = torch.load(head_file, weights_only=True)
    tensors = content["nets"]["nets"]
    name = "policy.noise_pred_net.blocks.2.mlp.fc2.bias"
    if edit == "missing":
        tensors.pop(name)
    elif edit == "extra":
        name = "policy.noise_pred_net.blocks.2.attn.gate"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(7)
    torch.save(content, head_file)
    with pytest.raises(CheckpointError, match=r"blocks\.2\."):
        open_stage1_head(head_file, heads=4)
