"""LoRA checkpoints: merged as PEFT merges them, with every tensor of the adapter accounted for."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from chatvla_edge.export.checkpoint.lora import is_lora, open_lora
from chatvla_edge.export.checkpoint.tensors import CheckpointError, from_tensors


class Tiny(nn.Module):
    """The names that matter of a Qwen2-VL with an action head."""

    def __init__(self):
        super().__init__()
        self.visual = nn.ModuleDict({"qkv": nn.Linear(6, 9)})
        self.model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "expert": nn.Linear(8, 5)})
        self.policy_head = nn.ModuleDict({"x_embedder": nn.Linear(3, 4)})
        self.lm_head = nn.Linear(8, 11, bias=False)


def train(model, **options):
    """Return a PEFT model whose adapter is not zero."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["qkv", "q_proj"], "bias": "none", **options}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return wrapped


@pytest.fixture
def made(tmp_path):
    """Base weights, the adapter's directory, and what PEFT merges them to."""
    torch.manual_seed(5)
    model = Tiny()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = train(model)
    wrapped.save_pretrained(tmp_path)
    return base, tmp_path, wrapped.merge_and_unload().state_dict()


def edit(directory, **changes):
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def same(source, expected):
    assert set(source.names) == set(expected)
    for name, tensor in expected.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


def test_an_adapter_is_merged_to_the_bits_of_peft(made):
    base, directory, expected = made
    assert is_lora(directory)
    source = open_lora(from_tensors(base), directory)
    same(source, expected)
    assert not torch.equal(source.read("model.q_proj.weight"), base["model.q_proj.weight"])


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"r": 1, "lora_alpha": 3}, {"r": 3, "lora_alpha": 7}])
def test_the_scale_follows_the_settings(tmp_path, options):
    model = Tiny()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = train(model, **options)
    wrapped.save_pretrained(tmp_path)
    same(open_lora(from_tensors(base), tmp_path), wrapped.merge_and_unload().state_dict())


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(tmp_path):
    base = {name: tensor.bfloat16() for name, tensor in Tiny().state_dict().items()}
    exact = Tiny()
    exact.load_state_dict({name: tensor.float() for name, tensor in base.items()})
    wrapped = train(exact)
    wrapped.save_pretrained(tmp_path)
    merged = {name: tensor.bfloat16() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    same(open_lora(from_tensors(base), tmp_path), merged)


def test_the_base_may_be_a_directory_and_nothing_is_merged_before_it_is_read(made, tmp_path):
    base, directory, expected = made
    (directory / "base").mkdir()
    save_file(base, directory / "base" / "model.safetensors")
    source = open_lora(directory / "base", directory)
    assert source.shape("visual.qkv.weight") == (9, 6)
    assert "model.safetensors +" in source.origin("visual.qkv.weight")
    same(source, expected)


def test_the_adapter_may_be_a_bin_with_the_name_of_the_adapter_in_its_keys(made):
    base, directory, expected = made
    adapter = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}
    torch.save(named, directory / "adapter_model.bin")
    same(open_lora(from_tensors(base), directory), expected)


# ----------------------------------------------------------------------------------- tensors trained beside the adapter


def checkpoint_with_head(tmp_path, prefix, layer):
    """Write an adapter with the non_lora_trainables of one public spelling; return the base and the merged tensors."""
    torch.manual_seed(7)
    model = Tiny()
    base = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if "policy_head" not in name}
    del base["model.expert.weight"], base["model.expert.bias"], base["lm_head.weight"]
    with torch.no_grad():
        model.load_state_dict({name: tensor.float() for name, tensor in base.items()}, strict=False)
        model.model["norm"].weight.add_(0.123)  # trained in full
    wrapped = train(model)
    wrapped.save_pretrained(tmp_path)
    everything = {name.removeprefix("base_model.model."): value for name, value in wrapped.state_dict().items()}
    everything = {prefix + name.replace(".base_layer.", layer): tensor.clone() for name, tensor in everything.items()}
    assert any(".lora_A." in name for name in everything)
    torch.save(everything, tmp_path / "non_lora_trainables.bin")
    return base, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("prefix", ["base_model.model.", "model."])
@pytest.mark.parametrize("layer", [".", ".base_layer."])
def test_tensors_beside_the_adapter_override_the_base_and_bring_the_head(tmp_path, prefix, layer):
    base, expected = checkpoint_with_head(tmp_path, prefix, layer)
    source = open_lora(from_tensors(base, "base"), tmp_path)
    same(source, expected)
    assert source.dtype("policy_head.x_embedder.weight") == torch.float32
    assert source.names[: len(base)] == tuple(base)
    assert any("copies of adapter tensors" in note for note in source.notes)


def test_an_override_of_another_shape_is_refused(tmp_path):
    base, _ = checkpoint_with_head(tmp_path, "base_model.model.", ".")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight': found shape \[8\]; expected \[9\]"):
        open_lora(from_tensors({**base, "model.norm.weight": torch.ones(9)}), tmp_path)


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    base, _ = checkpoint_with_head(tmp_path, "base_model.model.", ".")
    extra = torch.load(tmp_path / "non_lora_trainables.bin")
    extra["model.policy_head.x_embedder.bias"] = torch.ones(4)
    torch.save(extra, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match="which is the same tensor"):
        open_lora(from_tensors(base), tmp_path)


@pytest.mark.parametrize("old_peft", [False, True])
def test_modules_saved_in_full_override_the_base(tmp_path, old_peft):
    model = Tiny()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = train(model, modules_to_save=["norm"])
    with torch.no_grad():
        wrapped.base_model.model.model["norm"].modules_to_save["default"].weight.fill_(3)
    wrapped.save_pretrained(tmp_path)
    if old_peft:
        adapter = load_file(tmp_path / "adapter_model.safetensors")
        named = {name.replace(".norm.", ".norm.modules_to_save.default."): value for name, value in adapter.items()}
        save_file(named, tmp_path / "adapter_model.safetensors")
    source = open_lora(from_tensors(base), tmp_path)
    same(source, wrapped.merge_and_unload().state_dict())
    assert torch.equal(source.read("model.norm.weight"), torch.full((8,), 3.0))


# ----------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "found use_dora = True"),
        ({"fan_in_fan_out": True}, "found fan_in_fan_out = True"),
        ({"bias": "all"}, "found bias = 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "found rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "found alpha_pattern"),
        ({"layer_replication": [[0, 1]]}, "found layer_replication"),
        ({"init_lora_weights": "pissa"}, "found init_lora_weights = 'pissa'"),
        ({"something_of_next_year": 1}, "found something_of_next_year = 1"),
        ({"peft_type": "LOHA"}, "found peft_type 'LOHA'"),
        ({"r": 0}, "found r 0"),
        ({"r": 2.5}, r"found r 2\.5"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"r": 8}, r"with r = 8"),
    ],
)
def test_settings_that_change_the_merge_are_refused_by_name(made, changes, message):
    base, directory, _ = made
    edit(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_lora(from_tensors(base), directory)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_configuration_is_refused(made, text):
    base, directory, _ = made
    (directory / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        open_lora(from_tensors(base), directory)


A, B = "base_model.model.model.q_proj.lora_A.weight", "base_model.model.model.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A), r"model\.q_proj': found lora_B alone"),
        (lambda t: t.pop(B), r"model\.q_proj': found lora_A alone"),
        (lambda t: t.update({A: torch.ones(4, 7)}), r"model\.q_proj': found A \[4, 7\] and B \[8, 4\]"),
        (lambda t: t.update({B: torch.ones(7, 4)}), r"model\.q_proj': found A \[4, 8\] and B \[7, 4\]"),
        (lambda t: t.update({A.replace(".weight", ".default.weight"): torch.ones(4, 8)}), "a second one of this side"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_magnitude_vector": torch.ones(1)}),
            "lora_magnitude_vector",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(8)}),
            r"'base_model.model.model.norm.weight'",
        ),
        (
            lambda t: t.update(
                {A.replace("q_proj", "x"): torch.ones(4, 8), B.replace("q_proj", "x"): torch.ones(8, 4)}
            ),
            r"model\.x': found no 'model\.x\.weight' in the base",
        ),
    ],
)
def test_every_tensor_of_the_adapter_must_fit(made, change, message):
    base, directory, _ = made
    adapter = load_file(directory / "adapter_model.safetensors")
    change(adapter)
    save_file(adapter, directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_lora(from_tensors(base), directory)


def test_nan_in_an_adapter_is_refused_under_its_own_name(made):
    base, directory, _ = made
    adapter = load_file(directory / "adapter_model.safetensors")
    adapter[A][0, 0] = float("nan")
    save_file(adapter, directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight': found 1 NaN"):
        open_lora(from_tensors(base), directory).read("model.q_proj.weight")


def test_a_directory_without_an_adapter_is_refused(tmp_path):
    assert not is_lora(tmp_path)
    with pytest.raises(CheckpointError, match="found no adapter"):
        open_lora(from_tensors({}), tmp_path)
