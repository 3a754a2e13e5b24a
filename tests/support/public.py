"""Names and shapes of public checkpoints, spelled out by hand from what the public code registers.

Deliberately not made from the project's own key maps: this is what they are checked against. Geometry: that of `tiny`.
"""

H, INNER, LAYERS, VOCAB = 64, 48, 3, 320
VISION, DEPTH = 32, 2
WIDTH, BLOCKS, HORIZON, ACTIONS, STATES = 32, 4, 10, 14, 14


def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict:
    out = {f"{name}.weight": (rows, columns)}
    return out | {f"{name}.bias": (rows,)} if bias else out


def vision(prefix: str = "visual.") -> dict:
    out = {f"{prefix}patch_embed.proj.weight": (VISION, 3, 2, 14, 14)}
    for i in range(DEPTH):
        block = f"{prefix}blocks.{i}."
        for norm in ("norm1", "norm2"):
            out |= {f"{block}{norm}.weight": (VISION,), f"{block}{norm}.bias": (VISION,)}
        out |= linear(f"{block}attn.qkv", 3 * VISION, VISION) | linear(f"{block}attn.proj", VISION, VISION)
        out |= linear(f"{block}mlp.fc1", 4 * VISION, VISION) | linear(f"{block}mlp.fc2", VISION, 4 * VISION)
    out |= {f"{prefix}merger.ln_q.weight": (VISION,), f"{prefix}merger.ln_q.bias": (VISION,)}
    return (
        out | linear(f"{prefix}merger.mlp.0", 4 * VISION, 4 * VISION) | linear(f"{prefix}merger.mlp.2", H, 4 * VISION)
    )


def swiglu(prefix: str, width: int = INNER, names: tuple = ("gate_proj", "up_proj", "down_proj")) -> dict:
    gate, up, down = names
    return {
        f"{prefix}.{gate}.weight": (width, H),
        f"{prefix}.{up}.weight": (width, H),
        f"{prefix}.{down}.weight": (H, width),
    }


def language(mlp, prefix: str = "model.") -> dict:
    """`mlp` is called with the layer's prefix and returns the tensors that stand in place of its MLP."""
    out = {f"{prefix}embed_tokens.weight": (VOCAB, H), f"{prefix}norm.weight": (H,)}
    for i in range(LAYERS):
        layer = f"{prefix}layers.{i}."
        out |= linear(f"{layer}self_attn.q_proj", 64, H)
        out |= linear(f"{layer}self_attn.k_proj", 32, H) | linear(f"{layer}self_attn.v_proj", 32, H)
        out |= linear(f"{layer}self_attn.o_proj", H, 64, bias=False)
        out |= {f"{layer}input_layernorm.weight": (H,), f"{layer}post_attention_layernorm.weight": (H,)}
        out |= mlp(layer)
    return out


def dense(layer: str) -> dict:
    return swiglu(f"{layer}mlp")


def static(layer: str) -> dict:
    return swiglu(f"{layer}static_expert.experts.0") | swiglu(f"{layer}static_expert.experts.1")


def moevla(routed: int = 8, shared: int = 0, with_static: bool = False):
    def mlp(layer: str) -> dict:
        out = linear(f"{layer}share_moe_expert.routed_experts.router.topkroute_linear", routed, H)
        for e in range(routed):
            out |= swiglu(f"{layer}share_moe_expert.routed_experts.experts.{e}")
        for j in range(shared):
            out |= swiglu(f"{layer}share_moe_expert.shared_experts.{j}")
        return out | static(layer) if with_static else out

    return mlp


def deepseek(layer: str) -> dict:
    out = {f"{layer}deepseek_expert.gate.weight": (4, H), f"{layer}deepseek_expert.gate.bias": (4,)}
    for e in range(4):
        out |= swiglu(f"{layer}deepseek_expert.experts.{e}")
    return out | swiglu(f"{layer}deepseek_expert.shared_experts", 2 * INNER)


def mixtral(layer: str) -> dict:
    out = {f"{layer}block_sparse_moe.gate.weight": (8, H)}
    for e in range(8):
        out |= swiglu(f"{layer}block_sparse_moe.experts.{e}", names=("w1", "w3", "w2"))
    return out


def qwen2_moe(layer: str) -> dict:
    out = {f"{layer}mlp.gate.weight": (8, H), f"{layer}mlp.shared_expert_gate.weight": (1, H)}
    for e in range(8):
        out |= swiglu(f"{layer}mlp.experts.{e}", 24)
    return out | swiglu(f"{layer}mlp.shared_expert", 40)


def stacked(transposed: bool):
    def mlp(layer: str) -> dict:
        gate_up, down = ((8, H, 2 * INNER), (8, INNER, H)) if transposed else ((8, 2 * INNER, H), (8, H, INNER))
        return {
            f"{layer}mlp.gate.weight": (8, H),
            f"{layer}mlp.experts.gate_up_proj": gate_up,
            f"{layer}mlp.experts.down_proj": down,
        }

    return mlp


def projectors(film: bool) -> dict:
    out = {}
    for name in ("input_action_proj", "reasoning_action_proj"):
        out |= linear(f"{name}.mlps.0", H, H) | linear(f"{name}.mlps.2", H, H)
    if film:
        out |= linear("reasoning_film.scale_fc", H, H) | linear("reasoning_film.shift_fc", H, H)
    return out


def head(form: str) -> dict:
    """form: dexvla, chatvla or chatvla2."""
    prefix = "policy_head."
    out = linear(f"{prefix}x_embedder", WIDTH, ACTIONS)
    out |= linear(f"{prefix}t_embedder.mlp.0", WIDTH, 256) | linear(f"{prefix}t_embedder.mlp.2", WIDTH, WIDTH)
    out |= {f"{prefix}pos_embed": (1, HORIZON, WIDTH)}
    if form == "dexvla":
        out |= linear(f"{prefix}combine.0", 1024, H + STATES) | linear(f"{prefix}combine.2", 1024, 1024)
        out |= linear(f"{prefix}combine.4", H, 1024) | linear(f"{prefix}cond_obs_emb", WIDTH, H)
    else:
        out |= {f"{prefix}norm_after_pool.weight": (H,), f"{prefix}norm_after_pool.bias": (H,)}
        out |= linear(f"{prefix}cond_obs_emb", WIDTH, H + STATES)
    if form == "chatvla2":
        out |= linear(f"{prefix}cond_reasoning_emb", WIDTH, H + STATES)
        out |= linear(f"{prefix}hidden_states_for_cosattn", WIDTH, H)
    for i in range(BLOCKS):
        block = f"{prefix}blocks.{i}."
        if form == "chatvla2":
            out |= linear(f"{block}attn.q", WIDTH, WIDTH) | linear(f"{block}attn.kv", 2 * WIDTH, WIDTH)
        else:
            out |= linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH)
        out |= linear(f"{block}attn.proj", WIDTH, WIDTH)
        out |= linear(f"{block}mlp.fc1", 4 * WIDTH, WIDTH) | linear(f"{block}mlp.fc2", WIDTH, 4 * WIDTH)
        out |= linear(f"{block}adaLN_modulation.1", 6 * WIDTH, WIDTH)
    out |= linear(f"{prefix}final_layer.linear", ACTIONS, WIDTH)
    return out | linear(f"{prefix}final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)


LANGUAGE_CONFIG = {
    "architectures": ["Qwen2VLForConditionalGenerationForVLA"],
    "model_type": "qwen2_vla",
    "vocab_size": VOCAB,
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    # Saved as `default`; the sections stay.
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    # A diff to the class defaults, as saved configs are; `num_heads` is 16 by default and must be written here.
    "vision_config": {"hidden_size": H, "in_chans": 3, "model_type": "qwen2_vla", "num_heads": 2},
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
    "image_token_id": 304,
    "im_start_token_id": 300,
    "im_end_token_id": 301,
    "endoftext_token_id": 305,
}
