"""A tensor that is renamed, missing, extra, misshapen, truncated or NaN is refused by its name; configs are judged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

from chatvla_edge.export.checkpoint.errors import CheckpointError
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.publish import write_checkpoint
from chatvla_edge.export.checkpoint.reader import open_checkpoint


@pytest.fixture
def directory(tmp_path):
    model = tiny.model()
    tensors = dict(model.named_parameters())
    write_checkpoint(tmp_path / "c", model.spec, Layout(head_qkv="split"), tensors.__getitem__, dtype=torch.float32)
    return tmp_path / "c"


def change(directory, edit):
    """Rewrite the weights after `edit(tensors)`."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def configure(directory, **changes):
    """Change config.json; a dict changes a section, None removes a key."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            section = config[key]
            section.update(value)
            config[key] = {name: item for name, item in section.items() if item is not None}
        elif value is None:
            config.pop(key)
        else:
            config[key] = value
    file.write_text(json.dumps(config))


TENSORS = [
    "model.layers.1.self_attn.k_proj.bias",
    "model.layers.2.share_moe_expert.routed_experts.experts.7.up_proj.weight",
    "model.layers.0.share_moe_expert.routed_experts.router.topkroute_linear.weight",
    "visual.blocks.1.attn.qkv.weight",
    "policy_head.blocks.3.attn.kv.bias",
    "policy_head.final_layer.linear.weight",
    "input_action_proj.mlps.2.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(directory, name):
    change(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", TENSORS)
def test_a_renamed_tensor_is_named(directory, name):
    def rename(tensors):
        tensors[name + "_"] = tensors.pop(name)

    change(directory, rename)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.share_moe_expert.shared_gate.weight",
        "policy_head.blocks.0.attn.q_norm.weight",
        "something.new",
        "policy_head.combine.0.bias",
        "lm_heads.weight",
    ],
)
def test_an_extra_tensor_is_named(directory, name):
    change(directory, lambda tensors: tensors.update({name: torch.zeros(3, 2)}))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", TENSORS[:3] + TENSORS[4:])
def test_a_wrongly_shaped_tensor_is_named(directory, name):
    def grow(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    change(directory, grow)
    with pytest.raises(CheckpointError, match=r"shape|tensors imply|dimensions"):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_when_the_weights_are_read(directory, name, value):
    def spoil(tensors):
        tensors[name].flatten()[0] = value

    change(directory, spoil)
    checkpoint = open_checkpoint(directory)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.model()


def test_a_truncated_file_is_refused(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(directory)


def test_integer_weights_are_refused(directory):
    def quantize(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    change(directory, quantize)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*int8"):
        open_checkpoint(directory)


def test_known_leftovers_of_training_are_listed_with_their_reason(directory):
    change(
        directory,
        lambda tensors: tensors.update(
            {
                "expert_traffic": torch.zeros(28, 8),
                "policy_head.hidden_states_for_cosattn.weight": torch.zeros(32, 64),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            }
        ),
    )
    ignored = {entry.name: entry.reason for entry in open_checkpoint(directory).ignored}
    assert set(ignored) == {
        "expert_traffic",
        "policy_head.hidden_states_for_cosattn.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    assert all(ignored.values())


def test_a_stored_copy_of_the_tied_embedding_is_left_out(directory):
    change(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert [entry.name for entry in open_checkpoint(directory).ignored] == ["lm_head.weight"]


def test_an_output_matrix_that_contradicts_tying_is_refused(directory):
    change(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_checkpoint(directory)


def test_an_untied_output_matrix_is_used(directory):
    change(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    configure(directory, tie_word_embeddings=False)
    model = open_checkpoint(directory).model()
    assert torch.equal(model.backbone.lm_head.weight, model.backbone.language.embed_tokens.weight + 1)


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        ({"hidden_size": 128}, "hidden_size = 128"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2"),
        ({"intermediate_size": 8960}, "intermediate_size = 8960"),
        ({"policy_head_size": "DiT_L"}, "policy_head_size = DiT_L"),
        ({"policy_head_config": {"prediction_horizon": 16}}, "prediction_horizon = 16"),
        ({"policy_head_config": {"depth": 3}}, "depth = 3"),
        ({"using_film": True}, "using_film = True"),
        ({"vision_config": {"depth": 1}}, "depth = 1"),
        ({"routed_top_k": 0}, "top-4"),
    ],
)
def test_tensors_win_over_the_config_and_it_is_said(directory, changes, stated):
    expected = open_checkpoint(directory).spec
    configure(directory, **changes)
    checkpoint = open_checkpoint(directory)
    assert any(stated in note for note in checkpoint.notes), checkpoint.notes
    if "routed_top_k" not in changes:
        assert checkpoint.spec == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_scaling": None}, "mrope_section"),
        ({"policy_head_config": {"reasoning_layer_id": None}}, "reasoning_layer_id"),
        ({"policy_head_type": "unet_diffusion_policy"}, "U-Net"),
        ({"policy_head_config": {"learn_sigma": True}}, "learn_sigma"),
        ({"policy_head_config": {"is_tinyvla": True}}, "is_tinyvla"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"policy_head_config": {"reasoning_layer_id": 9}}, "reasoning_layer_id = 9"),
        ({"policy_head_config": {"reasoning_layer_id": 1.5}}, r"reasoning_layer_id = 1\.5"),
        ({"num_hidden_layers": 28}, "The last 25 are missing"),
        ({"policy_head_config": {"depth": 24}}, "The last 20 are missing"),
        ({"vision_config": {"depth": 32}}, "The last 30 are missing"),
        ({"rms_norm_eps": -1}, "rms_norm_eps = -1"),
        ({"rms_norm_eps": "4"}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta = 0"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"mrope_section": [-2, 5, 5]}}, "mrope_section"),
        ({"rope_scaling": {"mrope_section": "233"}}, "mrope_section"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"vision_config": 3}, "vision_config = 3"),
        ({"text_config": "x"}, "text_config"),
        ({"vision_config": {"num_heads": 3}}, "3 heads"),
        ({"vision_config": {"num_heads": 0}}, "num_heads = 0"),
        ({"policy_head_config": {"num_heads": -1}}, "num_heads = -1"),
        ({"policy_head_config": {"num_heads": True}}, "num_heads = True"),
        ({"policy_head_config": {"num_train_timesteps": 10**12}}, "num_train_timesteps"),
        ({"policy_head_config": {"num_inference_timesteps": 1.5}}, "num_inference_timesteps"),
        ({"policy_head_type": "x"}, "policy_head_type"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"routed_top_k": 1.5}, "routed_top_k"),
        ({"num_key_value_heads": -1}, "num_key_value_heads = -1"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"im_end_token_id": 100000}, "beyond the vocabulary"),
        ({"num_attention_heads": 3}, "3 attention heads|head dimension"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_attention_heads": "many"}, "many"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(directory, changes, message):
    configure(directory, **changes)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


def test_the_vision_towers_saved_config_may_be_a_diff_to_its_defaults(directory):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"] = {"hidden_size": 64, "in_chans": 3, "model_type": "qwen2_vla", "num_heads": 2}
    file.write_text(json.dumps(config))
    assert open_checkpoint(directory).spec == tiny.policy()


def test_generation_settings_in_the_heads_config_are_not_routing(directory):
    # Public configs dump dozens of defaults of generation, among them a top_k of 50.
    configure(directory, policy_head_config={"top_k": 50})
    assert open_checkpoint(directory).spec.language.experts.top_k == 2


def test_deepspeed_experts_are_refused_with_the_reason(directory):
    name = "model.layers.0.deepspeed_expert.deepspeed_moe.gate.wg.weight"
    change(directory, lambda tensors: tensors.update({name: torch.zeros(8, 64)}))
    with pytest.raises(CheckpointError, match="capacity"):
        open_checkpoint(directory)


def test_a_layer_number_beyond_reason_is_refused_before_a_model_is_laid_out(directory):
    def misname(tensors):
        tensors["model.layers.900000000.input_layernorm.weight"] = tensors.pop("model.layers.2.input_layernorm.weight")

    change(directory, misname)
    with pytest.raises(CheckpointError, match="900000000"):
        open_checkpoint(directory)


def test_a_directory_without_config_is_refused(directory):
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "\x00", '{"a": 1', '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 200_000, '{"a": ' + "9" * 5000 + "}"],
    ids=["empty", "list", "open", "nul", "cut", "nan", "twice", "deep", "long number"],
)
def test_a_broken_config_is_refused(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(directory)
