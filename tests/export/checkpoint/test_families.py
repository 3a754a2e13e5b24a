"""Whole checkpoints as other programs write them: transformers' own files, and a LoRA run of the research tree."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from chatvla_edge.export.checkpoint.errors import CheckpointError
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.publish import public_tensors, write_checkpoint
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.tokenizer import byte_level_tokenizer


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4},
        image_token_id=304,
        vision_start_token_id=302,
        vision_end_token_id=303,
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)


def logits(model, ids):
    return model(input_ids=ids[None]).logits[0]


def test_a_checkpoint_that_transformers_saved_reads_to_its_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.spec.variant == "Qwen2-VL"
    backbone = checkpoint.model().backbone
    ids = torch.arange(5, 25)
    hidden = backbone.hidden(backbone.embed(ids), torch.arange(20).expand(3, -1))
    torch.testing.assert_close(backbone.logits(hidden), logits(theirs, ids), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_that_we_wrote_loads_into_transformers(theirs, tmp_path):
    spec = tiny.policy(tiny.DENSE).model_copy(update={"head": None})
    model = tiny.model(spec)
    tensors = dict(model.named_parameters())
    write_checkpoint(tmp_path / "c", spec, Layout(), tensors.__getitem__, dtype=torch.float32)
    loaded, report = Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "c", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(5, 25)
    hidden = model.backbone.hidden(model.backbone.embed(ids), torch.arange(20).expand(3, -1))
    torch.testing.assert_close(model.backbone.logits(hidden), logits(loaded.eval(), ids), rtol=1e-5, atol=1e-6)


@pytest.fixture
def lora_run(tmp_path):
    """A run of the research tree: base, adapter in checkpoint-100, config and statistics one level up."""
    rng = torch.Generator().manual_seed(4)
    base_spec = tiny.policy(tiny.DENSE).model_copy(update={"head": None})
    base = tiny.model(base_spec)
    tensors = dict(base.named_parameters())
    write_checkpoint(tmp_path / "base", base_spec, Layout(), tensors.__getitem__, dtype=torch.float32)

    spec = tiny.policy(tiny.DENSE)
    trained = tiny.model(spec)
    for name, value in base.named_parameters():
        trained.get_parameter(name).copy_(value)
    target = "model.layers.1.self_attn.q_proj"
    down, up = torch.randn(4, 64, generator=rng) * 0.1, torch.randn(64, 4, generator=rng) * 0.1
    expected = trained.get_parameter("backbone.language.layers.1.self_attn.q_proj.weight")
    expected.copy_(expected + 16 / 4 * (up @ down))

    run = tmp_path / "run"
    checkpoint = run / "checkpoint-100"
    checkpoint.mkdir(parents=True)
    public = dict(public_tensors(dict(trained.named_parameters()), Layout(head_qkv="split")))
    non_lora = {
        name: value for name, value in public.items() if name.startswith(("policy_head.", "input_action", "reasoning"))
    }
    torch.save(
        {f"base_model.model.{name}": value.clone() for name, value in non_lora.items()},
        checkpoint / "non_lora_trainables.bin",
    )
    save_file(
        {f"base_model.model.{target}.lora_A.weight": down, f"base_model.model.{target}.lora_B.weight": up},
        checkpoint / "adapter_model.safetensors",
    )
    (checkpoint / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"]})
    )
    from chatvla_edge.export.checkpoint.publish import config_of

    (run / "config.json").write_text(json.dumps(config_of(spec, Layout(head_qkv="split"))))
    (run / "tokenizer.json").write_text(byte_level_tokenizer(spec.tokens))
    statistics = {
        f"{kind}_{what}": np.full(14, value, np.float32)
        for kind, what, value in [
            ("action", "mean", 0.0),
            ("action", "std", 1.0),
            ("action", "min", -1.0),
            ("action", "max", 2.0),
            ("qpos", "mean", 0.5),
            ("qpos", "std", 2.0),
        ]
    }
    (run / "dataset_stats.pkl").write_bytes(pickle.dumps({**statistics, "example_qpos": np.zeros((3, 14))}))
    return tmp_path / "base", checkpoint, trained


def test_a_lora_run_reads_to_the_merged_policy(lora_run):
    base, checkpoint, trained = lora_run
    opened = open_checkpoint(checkpoint, base=base)
    assert opened.spec == trained.spec
    for ours, expected in zip(tiny.outputs(opened.model()), tiny.outputs(trained), strict=True):
        assert torch.equal(ours, expected)


def test_its_statistics_and_tokenizer_are_found_one_level_up(lora_run):
    from chatvla_edge.export.model.images import PRESETS

    base, checkpoint, _ = lora_run
    policy = open_checkpoint(checkpoint, base=base).policy([PRESETS["arx"]])
    state = policy.normalization.state(np.full(14, 4.5, np.float32))
    assert np.array_equal(state, np.full(14, 2.0, np.float32))
    assert policy.normalization.chunk(np.ones((10, 14), np.float32)).max() == 2.0


def test_a_base_written_by_newer_transformers_serves_as_well(lora_run):
    base, checkpoint, trained = lora_run
    file = base / "model.safetensors"
    nested = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}": value
        for name, value in load_file(file).items()
    }
    save_file(nested, file)
    opened = open_checkpoint(checkpoint, base=base)
    assert torch.equal(tiny.outputs(opened.model())[-1], tiny.outputs(trained)[-1])


def test_a_lora_run_without_its_base_is_refused(lora_run):
    with pytest.raises(CheckpointError, match="--base"):
        open_checkpoint(lora_run[1])


def test_a_policy_without_statistics_is_refused(tmp_path):
    from chatvla_edge.export.model.images import PRESETS

    model = tiny.model()
    tensors = dict(model.named_parameters())
    write_checkpoint(tmp_path / "c", model.spec, Layout(), tensors.__getitem__)
    with pytest.raises(CheckpointError, match="dataset_stats"):
        open_checkpoint(tmp_path / "c").policy([PRESETS["arx"]])
