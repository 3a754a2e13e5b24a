"""Parameters, bytes and FLOPs of the full geometry, against figures computed by hand from the published shapes."""

import pytest

from chatvla_edge.export.accounting import flops, parameters
from chatvla_edge.export.checkpoint.synth import ARX, PRESETS
from chatvla_edge.export.spec import SCALEDP_SIZES, scaledp

PAPER = PRESETS["chatvla2-2b"][0]


def test_the_papers_policy_has_11_26_billion_parameters():
    counted = parameters(PAPER)
    assert counted.total == 11_264_814_062
    assert counted.parts == {
        "vision": 665_271_296,
        "embedding": 233_373_696,
        "attention": 154_198_016,
        "routed": 9_248_440_320,
        "router": 344_288,
        "norm": 28 * 2 * 1536 + 1536,
        "fusion": 9_443_328,
        "head": 953_655_566,
    }


def test_a_token_passes_through_2_7_billion_of_them():
    assert parameters(PAPER).active == 2_700_113_632


def test_qwen2_vl_2b_has_2_21_billion_parameters():
    counted = parameters(PRESETS["qwen2-vl-2b"][0])
    assert counted.total == 2_208_985_600
    assert counted.parts["mlp"] == 28 * 41_287_680


def test_families_have_their_published_sizes():
    billions = {name: parameters(PRESETS[name][0]).total / 1e9 for name in ("dexvla-2b", "chatvla-2b")}
    assert billions == {"dexvla-2b": pytest.approx(3.18, abs=0.005), "chatvla-2b": pytest.approx(3.84, abs=0.005)}


@pytest.mark.parametrize(("precision", "gigabytes"), [("bf16", 22.5), ("int8", 11.3), ("int4", 6.0)])
def test_bytes_of_all_weights(precision, gigabytes):
    assert parameters(PAPER).bytes(precision) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_shared_expert_adds_as_much_as_it_costs():
    evaluated = parameters(PRESETS["chatvla2-2b-arx"][0])
    assert evaluated.parts["shared"] == 1_156_055_040
    assert evaluated.active == 2_700_113_632 - 28 * 4 * 1537 + 1_156_055_040


@pytest.mark.parametrize(("prompt", "teraflops"), [(132, 0.655), (233, 1.16), (334, 1.67)])
def test_prefill_flops(prompt, teraflops):
    assert flops(PAPER, prompt).prefill / 1e12 == pytest.approx(teraflops, abs=0.005)


def test_flops_of_an_image_a_decode_token_and_a_head_step():
    counted = flops(PAPER, 132)
    assert counted.image / 1e12 == pytest.approx(0.532, abs=0.001)
    assert counted.decode / 1e9 == pytest.approx(5.4, abs=0.005)
    assert counted.denoise / 1e9 == pytest.approx(64.0, abs=0.1)


@pytest.mark.parametrize(
    ("size", "conditioning", "reasoning", "millions"),
    [
        ("H", "norm", None, 951.7),
        ("H", "norm", "latter", 953.7),
        ("H", "combine", None, 955.9),
        ("L", "norm", None, 458.4),
        ("L", "norm", "latter", 460.0),
        ("L", "combine", None, 462.6),
    ],
)
def test_head_sizes(size, conditioning, reasoning, millions):
    head = scaledp(size, **ARX, conditioning=conditioning, reasoning=reasoning)
    counted = parameters(PAPER.model_copy(update={"head": head})).parts["head"]
    assert counted / 1e6 == pytest.approx(millions, abs=0.05)
    assert head.size == size


def test_every_published_size_builds():
    assert {scaledp(size, **ARX).size for size in SCALEDP_SIZES} == {"S", "B", "L", "XL", "H"}
