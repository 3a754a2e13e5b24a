"""`verify --bisect` names the layer in which a fault was planted, and no other."""

import pytest
from support import faults
from support.faults import HEAD, LANGUAGE, VISION

from chatvla_edge.export.bisect import bisect
from chatvla_edge.export.lower.onnxruntime import PRECISIONS
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.probes import dequantized, observation, scenes

EXPERTS = 8
MLP = f"{LANGUAGE}.1.mlp.routed"

FAULTS = {
    "one layer's output map scaled": (
        faults.scaled(f"{LANGUAGE}.1.self_attn.o_proj.weight"), ["language, layer 1, attention"]
    ),
    "one layer's values scaled": (
        faults.scaled(f"{LANGUAGE}.3.self_attn.v_proj.weight"), ["language, layer 3, attention"]
    ),
    "experts rotated in one layer": (faults.experts_rotated(EXPERTS, "2"), ["language, layer 2, experts"]),
    "gate and up exchanged in one layer": (faults.gate_for_up("3"), ["language, layer 3, experts"]),
    "one expert scaled": (faults.scaled(f"{MLP}.5.down_proj.weight", 1.5), ["language, layer 1, experts"]),
    "router rows one further": (faults.rolled(f"{LANGUAGE}.0.mlp.router.weight"), ["language, layer 0, router"]),
    "rotary sections exchanged in one layer": (faults.sections_exchanged(2), ["language, layer 2, attention"]),
    "rotary sections exchanged": (
        faults.believed(mrope_section=(1, 3, 4)), [f"language, layer {i}, attention" for i in range(4)]
    ),
    "embeddings one further, which the output matrix shares": (
        faults.rolled("backbone.language.embed_tokens.weight"), ["language, embedding", "language, output matrix"]
    ),
    "last norm scaled": (faults.scaled("backbone.language.norm.weight"), ["language, final norm"]),
    "patches scaled": (faults.scaled("backbone.visual.patch_embed.proj.weight"), ["vision[4x6], patch embedding"]),
    "a vision block's map transposed": (
        faults.transposed(f"{VISION}.1.attn.proj.weight"), ["vision[4x6], block 1, attention"]
    ),
    "a vision block's mlp scaled": (faults.scaled(f"{VISION}.2.mlp.fc1.weight"), ["vision[4x6], block 2, mlp"]),
    "the merger scaled": (faults.scaled("backbone.visual.merger.mlp.2.weight"), ["vision[4x6], merger"]),
    "a projector transposed": (
        faults.transposed("fusion.reasoning_projector.2.weight"), ["condition, reasoning projector"]
    ),
    "a block's modulations scaled": (
        faults.scaled(f"{HEAD}.2.adaLN_modulation.1.weight"), ["condition, block 2, modulations"]
    ),
    "a head's map transposed": (faults.transposed(f"{HEAD}.1.attn.proj.weight"), ["denoise, block 1, attention"]),
    "a head's mlp scaled": (faults.scaled(f"{HEAD}.3.mlp.fc2.weight"), ["denoise, block 3, mlp"]),
    "actions one further": (faults.rolled("head.final_layer.linear.weight"), ["denoise, final layer and step"]),
    "a fault in two places": (
        faults.Fault(
            weights=lambda name, read: read(name) * 1.2
            if name in (f"{VISION}.0.mlp.fc2.weight", f"{LANGUAGE}.2.self_attn.v_proj.weight")
            else read(name)
        ),
        ["vision[4x6], block 0, mlp", "language, layer 2, attention"],
    ),
}  # fmt: skip
# Activations are rounded in int8 and int4: these must stand out of that, too.
ROUNDED = [
    "one layer's output map scaled",
    "experts rotated in one layer",
    "gate and up exchanged in one layer",
    "one expert scaled",
    "router rows one further",
    "rotary sections exchanged in one layer",
    "a vision block's map transposed",
    "a head's mlp scaled",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return faults.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", sharpness=4)


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request):
    return request.param


@pytest.fixture(scope="module")
def held(checkpoint, precision):
    return dequantized(checkpoint.model(), PRECISIONS[precision])


@pytest.fixture(scope="module")
def observed(checkpoint):
    normalization, cameras = checkpoint.normalization(), faults.ROBOT("top").cameras
    (scene,) = scenes(1, [(camera.height, camera.width) for camera in cameras], normalization, 50, first=7)
    steps = {camera.name: Preprocessing(camera.preprocessing) for camera in cameras}
    return observation(checkpoint.spec, steps, checkpoint.prompt(), normalization, scene)


def taken_apart(bundle, held, observed):
    return bisect(bundle.path, bundle.manifest, held, observed)


def test_no_part_of_an_honest_bundle_diverges(checkpoint, precision, held, observed, tmp_path):
    bundle = faults.export(checkpoint, tmp_path / "b", precision, gates=False)
    before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
    parts = taken_apart(bundle, held, observed)
    assert [part.name for part in parts if part.diverges] == []
    assert len(parts) == (1 + 2 * 3 + 1) + (1 + 2 * 4 + 2) + (4 + 5) + (1 + 2 * 4 + 1)
    assert all(part.cosine > 0.999 for part in parts)
    assert [part.routing for part in parts if part.what == "experts"] == [1.0] * 4
    # The bundle is what it was, and nothing was laid beside it.
    assert {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [bundle.path]


@pytest.mark.parametrize("variant", ["chatvla2-2b-arx", "chatvla-2b", "dexvla-2b"])
def test_every_public_variant_can_be_taken_apart(variant, tmp_path):
    """Shared beside routed experts; static ones and FiLM; a dense model and a head without reasoning."""
    opened = faults.checkpoint(tmp_path / "c", layers=2, variant=variant)
    bundle = faults.export(opened, tmp_path / "b", "fp32")
    parts = {result.name: result for result in bundle.manifest.gates.results if "/parts/" in result.name}
    routed = opened.spec.language.experts.routed > 0
    assert len(parts) == 4 + routed
    assert {result.verdict for result in parts.values()} == {"passed"}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_part_that_diverges_is_the_planted_one(fault, checkpoint, precision, held, observed, tmp_path, monkeypatch):
    if precision != "fp32" and fault not in ROUNDED:
        pytest.skip("shown in fp32")
    change, expected = FAULTS[fault]
    with faults.planted(change, monkeypatch):
        bundle = faults.export(checkpoint, tmp_path / "b", precision, gates=False)
    parts = taken_apart(bundle, held, observed)
    found = [part.name for part in parts if part.diverges]
    # What follows a map inside `condition`, which is not cut, diverges with it.
    assert found[: len(expected)] == expected
    assert all(name.startswith("condition") for name in found[len(expected) :])
