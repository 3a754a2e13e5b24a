"""The published arithmetic once more, in numpy float64, one token at a time where it can be: slow, plain, and written
from the facts rather than from the code under test. Only parameter names are shared.
"""

import math

import numpy as np


def weights_of(module, prefix: str = "") -> dict[str, np.ndarray]:
    """The parameters below `prefix`, in float64 (exact for every dtype we store)."""
    state = module.state_dict()
    return {name[len(prefix) :]: value.double().numpy() for name, value in state.items() if name.startswith(prefix)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def standardize(x, eps):
    """Zero mean and unit variance along the last axis."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def linear(w, name, x):
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def to_bf16(x):
    """float32 -> the nearest bfloat16, ties to even, by its bits; returned as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    return ((bits + 0x7FFF + odd) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)


# ------------------------------------------------------------------------------------------------------- experts


def swiglu(w, name, x):
    return linear(w, f"{name}.down_proj", silu(linear(w, f"{name}.gate_proj", x)) * linear(w, f"{name}.up_proj", x))


def route(w, spec, x) -> dict[int, float]:
    """One token [D] -> weight of each expert it visits, as Mixtral and DeepSeek write it: score all, keep the best."""
    logits = [float(w["router.weight"][e] @ x) for e in range(spec.routed)]
    bias = w.get("router.bias", np.zeros(spec.routed))
    if spec.scoring == "sigmoid":
        scores = [float(sigmoid(logit)) for logit in logits]
        merit = [score + float(b) for score, b in zip(scores, bias, strict=True)]
    else:
        merit = [logit + float(b) for logit, b in zip(logits, bias, strict=True)]
        powers = [math.exp(logit - max(merit)) for logit in merit]
        scores = [power / sum(powers) for power in powers]
    kept = sorted(range(spec.routed), key=lambda e: merit[e], reverse=True)[: spec.top_k]
    total = sum(scores[e] for e in kept) if spec.renormalize else 1.0
    return {e: scores[e] / total for e in kept}


def mixture(w, spec, rows) -> tuple[np.ndarray, np.ndarray]:
    """[T, D] -> output [T, D] and visits per expert [E]."""
    out, visits = np.zeros_like(rows), np.zeros(spec.routed, np.int64)
    for t, x in enumerate(rows):
        y = np.zeros_like(x)
        if spec.routed:
            for expert, weight in route(w, spec, x).items():
                y += weight * swiglu(w, f"routed.{expert}", x)
                visits[expert] += 1
        for index in range(spec.shared):
            gate = float(sigmoid(linear(w, "shared_gate", x)[0])) if spec.shared_gate else 1.0
            y += gate * swiglu(w, f"shared.{index}", x)
        if spec.static:
            fixed = swiglu(w, f"static.{spec.static_active}", x)
            y = (y + fixed) / 2 if spec.routed or spec.shared else fixed
        out[t] = y
    return out, visits


# -------------------------------------------------------------------------------------------------------- fusion


def fuse(w, kind, prompt, reasoning) -> tuple[np.ndarray, np.ndarray]:
    """Means [D] of prompt and reasoning -> observation vector, reasoning vector."""

    def project(name, x):
        return linear(w, f"{name}.2", gelu_exact(linear(w, f"{name}.0", x)))

    observed, reasoned = project("input_projector", prompt), project("reasoning_projector", reasoning)
    if kind == "film":
        scale, shift = linear(w, "film.scale", reasoned), linear(w, "film.shift", reasoned)
        return observed * (1 + scale) + shift + prompt, reasoned
    return observed + reasoned, reasoned


# -------------------------------------------------------------------------------------------------- action head


def timestep_features(t: int) -> np.ndarray:
    """256 features of a time step with the published roundings: table in bf16, cosines then sines, result in bf16."""
    index = np.arange(128, dtype=np.float32)  # exact in bf16
    exponent = to_bf16(np.float32(-math.log(10_000)) * index) / np.float32(128)  # a power of two: no rounding
    table = to_bf16(np.exp(exponent.astype(np.float64)))
    angles = np.float32(t) * table
    return to_bf16(np.concatenate([np.cos(angles), np.sin(angles)])).astype(np.float64)


def attention(w, name, x, heads):
    """Self-attention from split projections, `q` and `kv`, as the research tree stores them."""
    width = x.shape[-1]
    q, kv = linear(w, f"{name}.q", x), linear(w, f"{name}.kv", x)
    k, v = kv[:, :width], kv[:, width:]
    size = width // heads
    out = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(x)):
            scores = k[:, part] @ q[row, part] / math.sqrt(size)
            power = np.exp(scores - scores.max())
            out[row, part] = (power / power.sum()) @ v[:, part]
    return linear(w, f"{name}.proj", out)


def split_qkv(w):
    """Fused `qkv` [3n, n] -> `q` [n, n] and `kv` [2n, n]."""
    out = {}
    for name, value in w.items():
        if ".qkv." in name:
            third = len(value) // 3
            out[name.replace(".qkv.", ".q.")] = value[:third]
            out[name.replace(".qkv.", ".kv.")] = value[third:]
        else:
            out[name] = value
    return out


def conditions(w, spec, observation, reasoning, state):
    """Vectors [D], [D], [S] -> the observation condition and the reasoning condition, [n] each (None if unused)."""

    def normed(x):
        return standardize(x, 1e-5) * w["norm_after_pool.weight"] + w["norm_after_pool.bias"]

    if spec.conditioning == "combine":
        x = np.concatenate([observation, state])
        x = np.maximum(linear(w, "combine.0", x), 0)
        x = np.maximum(linear(w, "combine.2", x), 0)
        return linear(w, "cond_obs_emb", linear(w, "combine.4", x)), None
    observed = linear(w, "cond_obs_emb", np.concatenate([normed(observation), state]))
    if spec.reasoning is None:
        return observed, None
    return observed, linear(w, "cond_reasoning_emb", np.concatenate([normed(reasoning), state]))


def predict_noise(w, spec, x, t, observed, reasoned):
    """x [H, A] at time step t -> the noise in it [H, A]. `w` holds split q and kv."""
    time = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", timestep_features(t))))
    follows = {i for i in range(spec.depth) if spec.reasoning and spec.reasoning.start <= i < spec.reasoning.stop}
    h = linear(w, "x_embedder", x) + w["pos_embed"][0]
    for i in range(spec.depth):
        name = f"blocks.{i}"
        c = time + (reasoned if i in follows else observed)
        six = linear(w, f"{name}.adaLN_modulation.1", silu(c)).reshape(6, spec.width)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        h = h + gate_a * attention(w, f"{name}.attn", standardize(h, 1e-6) * (1 + scale_a) + shift_a, spec.heads)
        inner = linear(w, f"{name}.mlp.fc1", standardize(h, 1e-6) * (1 + scale_m) + shift_m)
        h = h + gate_m * linear(w, f"{name}.mlp.fc2", gelu_tanh(inner))
    c = time + (reasoned if spec.reasoning and spec.reasoning.final else observed)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(c)).reshape(2, spec.width)
    return linear(w, "final_layer.linear", standardize(h, 1e-6) * (1 + scale) + shift)


def alpha_bars(steps: int = 100, max_beta: float = 0.999) -> np.ndarray:
    """Squared-cosine schedule, float64."""

    def level(x):
        return math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2

    kept = [1 - min(1 - level((i + 1) / steps) / level(i / steps), max_beta) for i in range(steps)]
    return np.cumprod(kept)


def sample(noise, predict) -> np.ndarray:
    """Ten DDIM steps from `noise`, float64; predict(x, t) -> epsilon."""
    bars = alpha_bars()
    x = noise
    for t in range(90, -1, -10):
        now, then = bars[t], bars[t - 10] if t else 1.0
        epsilon = predict(x, t)
        x0 = np.clip((x - math.sqrt(1 - now) * epsilon) / math.sqrt(now), -1, 1)
        x = math.sqrt(then) * x0 + math.sqrt(1 - then) * epsilon
    return x


# ------------------------------------------------------------------------------------------------------- pixels


def bilinear_antialias(plane, height, width):
    """[h, w] -> [height, width] float64: a triangle filter as wide as the reduction, pixel centres at one half."""

    def resize_axis(lines, size):  # along the first axis
        scale = len(lines) / size
        reach = max(scale, 1.0)
        centre = (np.arange(size) + 0.5) * scale
        distance = np.abs(np.arange(len(lines)) + 0.5 - centre[:, None]) / reach
        weight = np.maximum(1 - distance, 0)
        return (weight / weight.sum(1, keepdims=True)) @ lines

    return resize_axis(resize_axis(np.asarray(plane, np.float64), height).T, width).T
