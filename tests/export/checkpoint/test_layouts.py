"""Every public layout: found by its names, read to the same numbers it was written from, back to the same files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support import public, tiny

from chatvla_edge.export.checkpoint.errors import CheckpointError
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.publish import config_of, parameter_shapes, public_tensors, write_checkpoint
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.tensors import open_tensors
from chatvla_edge.export.spec import ExpertsSpec

V1 = ExpertsSpec(static=2, static_active=1)
NORM_HEAD = tiny.head(reasoning=None)
DEXVLA_HEAD = tiny.head(reasoning=None, conditioning="combine")

# name -> spec, layout, the public tensors by hand, and what the public config says of experts and head.
CASES = {
    "dexvla": (
        tiny.policy(tiny.DENSE, fusion="film", head_spec=DEXVLA_HEAD),
        Layout(),
        public.language(public.dense) | public.projectors(film=True) | public.head("dexvla"),
        {"using_film": True, "policy_head_type": "scale_dp_policy"},
    ),
    "chatvla v1": (
        tiny.policy(V1, fusion="film", head_spec=NORM_HEAD),
        Layout(),
        public.language(public.static) | public.projectors(film=True) | public.head("chatvla"),
        # v1 configs have no using_film key: FiLM is unconditional there.
        {"using_moe": True, "policy_head_type": "scale_dp_policy"},
    ),
    "chatvla-2, 8 experts": (
        tiny.policy(ExpertsSpec(routed=8, top_k=2)),
        Layout(head_qkv="split"),
        public.language(public.moevla(8)) | public.projectors(film=False) | public.head("chatvla2"),
        {"using_film": False, "routed_top_k": 2, "reasoning": 2},
    ),
    "chatvla-2, 4 routed + 1 shared": (
        tiny.policy(ExpertsSpec(routed=4, top_k=2, shared=1)),
        Layout(head_qkv="split"),
        public.language(public.moevla(4, shared=1)) | public.projectors(film=False) | public.head("chatvla2"),
        {"using_film": False, "routed_top_k": 0, "reasoning": 2},
    ),
    "static + dynamic": (
        tiny.policy(ExpertsSpec(routed=4, top_k=2, static=2, static_active=1)),
        Layout(head_qkv="split"),
        public.language(public.moevla(4, with_static=True)) | public.projectors(film=False) | public.head("chatvla2"),
        {"using_film": False, "routed_top_k": 2, "reasoning": 2},
    ),
    "deepseek": (
        tiny.policy(ExpertsSpec(routed=4, top_k=2, scoring="sigmoid", shared=1, shared_width=2 * public.INNER)),
        Layout(experts="deepseek", head_qkv="split"),
        public.language(public.deepseek) | public.projectors(film=False) | public.head("chatvla2"),
        {"using_deepseek_moe": True, "reasoning": 2},
    ),
    "mixtral": (
        tiny.policy(ExpertsSpec(routed=8, top_k=2, router_bias=False), head_spec=NORM_HEAD),
        Layout(experts="mixtral"),
        public.language(public.mixtral) | public.projectors(film=False) | public.head("chatvla"),
        {"num_experts_per_tok": 2},
    ),
    "qwen2-moe": (
        tiny.policy(
            ExpertsSpec(
                routed=8,
                top_k=4,
                routed_width=24,
                router_bias=False,
                renormalize=False,
                shared=1,
                shared_width=40,
                shared_gate=True,
            ),
            head_spec=NORM_HEAD,
        ),
        Layout(experts="qwen"),
        public.language(public.qwen2_moe) | public.projectors(film=False) | public.head("chatvla"),
        {"num_experts_per_tok": 4, "norm_topk_prob": False, "moe_intermediate_size": 24},
    ),
    "qwen3-vl-moe": (
        tiny.policy(ExpertsSpec(routed=8, top_k=2, router_bias=False), head_spec=NORM_HEAD),
        Layout(experts="stacked", prefixes="nested"),
        public.language(public.stacked(False), "model.language_model.")
        | public.projectors(film=False)
        | public.head("chatvla"),
        {"num_experts_per_tok": 2},
    ),
    "qwen3-vl-moe, older files": (
        tiny.policy(ExpertsSpec(routed=8, top_k=2, router_bias=False), head_spec=NORM_HEAD),
        Layout(experts="stacked-transposed"),
        public.language(public.stacked(True)) | public.projectors(film=False) | public.head("chatvla"),
        {"num_experts_per_tok": 2},
    ),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    spec, layout, names, config = CASES[request.param]
    prefix = "model.visual." if layout.prefixes == "nested" else "visual."
    return spec, layout, public.vision(prefix) | names, config


def public_config(spec, stated):
    """config.json as the public code saves it: the head's section is a diff, sizes that are defaults are left out."""
    stated = dict(stated)
    section = {"model_type": "x", "input_dim": 14, "state_dim": 14, "depth": 4, "n_emb": 32, "num_heads": 4}
    if (reasoning := stated.pop("reasoning", None)) is not None:
        section["reasoning_layer_id"] = reasoning
    return {**public.LANGUAGE_CONFIG, "policy_head_config": section, **stated}


def assert_same(model, other):
    for ours, theirs in zip(tiny.outputs(model), tiny.outputs(other), strict=True):
        assert torch.equal(ours, theirs)


def write(directory, model, layout, dtype=torch.float32):
    tensors = dict(model.named_parameters())
    write_checkpoint(directory, model.spec, layout, tensors.__getitem__, dtype=dtype)


def test_a_written_checkpoint_reads_back_to_identical_outputs(case, tmp_path):
    spec, layout, _, _ = case
    model = tiny.model(spec)
    write(tmp_path / "c", model, layout)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.spec == spec
    assert checkpoint.layout == layout
    assert_same(checkpoint.model(), model)


def test_written_names_and_shapes_are_the_public_ones(case):
    spec, layout, names, _ = case
    tensors = dict(tiny.model(spec).named_parameters())
    written = {name: tuple(tensor.shape) for name, tensor in public_tensors(tensors, layout)}
    unused = {name for name in names if "hidden_states_for_cosattn" in name}
    assert written == {name: shape for name, shape in names.items() if name not in unused}


def test_a_public_checkpoint_is_read_by_its_own_names_and_config(case, tmp_path):
    spec, layout, names, config = case
    generator = torch.Generator().manual_seed(1)
    stored = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in names.items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(public_config(spec, config)))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.spec == spec
    assert checkpoint.layout == layout
    read = dict(checkpoint.read())
    assert set(read) == set(parameter_shapes(spec))
    for name, tensor in public_tensors(read, layout):
        assert torch.equal(tensor, stored[name]), name
    assert {ignored.name for ignored in checkpoint.ignored} == {name for name in names if "cosattn" in name}


def test_fused_experts_go_to_their_own_gate_up_and_down(tmp_path):
    spec, _, names, config = CASES["qwen3-vl-moe, older files"]
    names = public.vision() | names
    stored = {name: torch.randn(shape) for name, shape in names.items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(public_config(spec, config)))
    checkpoint = open_checkpoint(tmp_path)
    fused = stored["model.layers.1.mlp.experts.gate_up_proj"]
    ours = "backbone.language.layers.1.mlp.routed.5."
    assert torch.equal(checkpoint.tensor(f"{ours}gate_proj.weight"), fused[5, :, : public.INNER].T)
    assert torch.equal(checkpoint.tensor(f"{ours}up_proj.weight"), fused[5, :, public.INNER :].T)
    down = stored["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(checkpoint.tensor(f"{ours}down_proj.weight"), down[5].T)


def test_split_attention_is_joined_as_query_then_key_and_value(tmp_path):
    spec, layout, *_ = CASES["chatvla-2, 8 experts"]
    model = tiny.model(spec)
    write(tmp_path / "c", model, layout)
    stored = open_tensors(tmp_path / "c")
    q, kv = (stored.read(f"policy_head.blocks.2.attn.{part}.weight") for part in ("q", "kv"))
    assert torch.equal(torch.cat([q, kv]), model.head.blocks[2].attn.qkv.weight)


def test_sharded_and_single_files_read_alike(tmp_path):
    spec, layout, *_ = CASES["chatvla-2, 8 experts"]
    model = tiny.model(spec)
    tensors = dict(model.named_parameters())
    write_checkpoint(tmp_path / "c", spec, layout, tensors.__getitem__, dtype=torch.float32, max_shard_bytes=100_000)
    assert len(list((tmp_path / "c").glob("model-*-of-*.safetensors"))) > 5
    assert_same(open_checkpoint(tmp_path / "c").model(), model)


def test_bf16_storage_rounds_once(tmp_path):
    spec, layout, *_ = CASES["chatvla-2, 8 experts"]
    model = tiny.model(spec)
    write(tmp_path / "c", model, layout, dtype=torch.bfloat16)
    for name, tensor in open_checkpoint(tmp_path / "c").read(torch.float32):
        assert torch.equal(tensor, model.get_parameter(name).bfloat16().float()), name


def test_the_question_answering_view_of_chatvla_v1_uses_expert_0_and_has_no_head(tmp_path):
    spec, layout, *_ = CASES["chatvla v1"]
    model = tiny.model(spec)
    write(tmp_path / "c", model, layout)
    robot, answers = open_checkpoint(tmp_path / "c"), open_checkpoint(tmp_path / "c", view="vqa")
    assert robot.spec.language.experts.static_active == 1
    assert answers.spec.language.experts.static_active == 0
    assert answers.spec.head is None
    assert {ignored.name.split(".")[0] for ignored in answers.ignored} == {
        "policy_head",
        "input_action_proj",
        "reasoning_action_proj",
        "reasoning_film",
    }
    as_zero = tiny.model(
        spec.model_copy(
            update={
                "language": spec.language.model_copy(update={"experts": ExpertsSpec(static=2, static_active=0)}),
                "head": None,
            }
        )
    )
    as_zero.load_state_dict({name: value for name, value in model.state_dict().items() if name.startswith("backbone.")})
    assert_same(answers.model(), as_zero)


def test_a_layout_that_cannot_say_a_variant_is_refused_before_writing(tmp_path):
    spec = tiny.policy(ExpertsSpec(routed=8, top_k=2, shared=2))
    with pytest.raises(CheckpointError, match="read back as"):
        write(tmp_path / "c", tiny.model(spec), Layout(experts="deepseek", head_qkv="split"))
    assert not (tmp_path / "c" / "config.json").exists()


def test_former_half_and_full_injection_survive_the_files(tmp_path):
    from chatvla_edge.export.spec import ReasoningSpec

    for index, reasoning in enumerate([ReasoningSpec(start=0, stop=4), ReasoningSpec(start=0, stop=2, final=False)]):
        spec = tiny.policy(head_spec=tiny.head(reasoning=reasoning))
        write(tmp_path / str(index), tiny.model(spec), Layout())
        assert open_checkpoint(tmp_path / str(index)).spec == spec


def test_config_of_states_every_value(case):
    spec, layout, _, _ = case
    config = config_of(spec, layout)
    assert config["policy_head_config"]["prediction_horizon"] == spec.head.horizon
    assert json.loads(json.dumps(config)) == config
