"""The reference over weights that stay in the checkpoint computes what a model in memory computes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from chatvla_edge.export import streaming
from chatvla_edge.export.probes import dequantized, rounding, speak
from chatvla_edge.export.quantize import PRECISIONS, dequantize, quantize
from chatvla_edge.export.spec import ExpertsSpec
from chatvla_edge.export.streaming import streamed

EXPERTS = {
    "dense": tiny.DENSE,
    "routed": tiny.DYNAMIC,
    "shared": ExpertsSpec(routed=4, top_k=2, shared=1, shared_gate=True),
    "static": ExpertsSpec(static=2, static_active=1),
}
GRIDS = [(4, 8)]
PROMPT = torch.tensor([300, 7, *[304] * 8, 9, 11, 301])


@pytest.fixture(autouse=True)
def _several_slabs(monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", 4 * 64 * 16)


def spec(kind="routed", tied=True, fusion="sum"):
    found = tiny.policy(EXPERTS[kind], fusion=fusion)
    return found.model_copy(update={"language": found.language.model_copy(update={"tied": tied})})


def stored(model):
    """The model's parameters as a checkpoint holds them, and the names that were asked for."""
    asked: list[str] = []
    tensors = dict(model.named_parameters())

    def read(name):
        asked.append(name)
        return tensors[name].detach()

    return read, asked


@pytest.mark.parametrize("fusion", ["sum", "film"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", EXPERTS)
def test_streamed_weights_compute_what_held_ones_do(kind, tied, fusion):
    model = tiny.model(spec(kind, tied, fusion))
    read, asked = stored(model)
    lazy = streamed(model.spec, read, held=0)
    before = len(asked)
    for found, expected in zip(tiny.outputs(lazy), tiny.outputs(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(asked) > before + 50, "or nothing was streamed"
    maps = [module.weight for module in lazy.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))]
    in_memory = [weight for weight in maps if not weight.is_meta]
    assert sum(weight.numel() for weight in in_memory) == sum(
        module.weight.numel() for module in lazy.head.t_embedder.modules() if isinstance(module, torch.nn.Linear)
    )


def test_a_model_that_fits_is_read_once():
    model = tiny.model(spec())
    read, asked = stored(model)
    held = streamed(model.spec, read)
    before = len(asked)
    for found, expected in zip(tiny.outputs(held), tiny.outputs(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(asked) == before == len(set(asked)) + 1  # the table once more, as the output head


@pytest.mark.parametrize("name", ["int8", "int4", "int8-row", "int4-row"])
def test_rounding_slab_by_slab_is_rounding_the_whole(name):
    model = tiny.model(spec("dense"))
    precision = PRECISIONS[name]
    whole = dequantized(model, precision)
    lazy = streamed(model.spec, stored(model)[0], rounding(precision), held=0)
    for found, expected in zip(tiny.outputs(lazy), tiny.outputs(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # And the whole is what `quantize` makes of each map, the table and what is small left alone.
    for name in ("backbone.language.layers.1.self_attn.q_proj.weight", "backbone.lm_head.weight"):
        weight, form = model.get_parameter(name).numpy(), precision.form(name, tuple(model.get_parameter(name).shape))
        np.testing.assert_array_equal(
            whole.get_parameter(name).numpy(), dequantize(quantize(weight, form), form, weight.shape[1])
        )
    for name in ("backbone.language.embed_tokens.weight", "backbone.language.norm.weight", "head.x_embedder.weight"):
        torch.testing.assert_close(whole.get_parameter(name), model.get_parameter(name), rtol=0, atol=0)


MODEL = tiny.model(spec())
IMAGES = MODEL.backbone.images(torch.randn(32, 1176, generator=torch.Generator().manual_seed(5)), GRIDS)
PLAIN = MODEL.backbone.generate(PROMPT, IMAGES, GRIDS, 20)


def passes(draft, max_tokens=20):
    """What is said with a draft, and in how many passes over the weights."""
    count = 0

    def step(*_):
        nonlocal count
        count += 1

    handle = MODEL.backbone.language.register_forward_hook(step)
    generation, routing = speak(MODEL, PROMPT, IMAGES, GRIDS, max_tokens, draft)
    handle.remove()
    return generation, routing, count


@settings(max_examples=60, deadline=None)
@given(
    keep=st.integers(0, 20),
    wrong=st.lists(st.integers(0, 319), max_size=30),
    rest=st.integers(0, 20),
)
def test_a_draft_changes_the_passes_and_not_the_text(keep, wrong, rest):
    draft = [*PLAIN.token_ids[:keep], *wrong, *PLAIN.token_ids[rest:]]
    generation, routing, count = passes(draft)
    assert generation.token_ids == PLAIN.token_ids
    torch.testing.assert_close(generation.prompt, PLAIN.prompt, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(generation.decoded, PLAIN.decoded, rtol=1e-4, atol=1e-5)
    assert routing.shape == (3, len(PROMPT) + len(PLAIN.token_ids) - 1, 2)
    assert count <= len(PLAIN.token_ids)


def test_a_good_draft_is_one_pass_and_none_is_one_per_token():
    assert passes(PLAIN.token_ids)[2] == 1
    assert passes([])[2] == len(PLAIN.token_ids)
    assert passes(PLAIN.token_ids, max_tokens=1)[0].token_ids == PLAIN.token_ids[:1]


def test_it_stops_at_the_end_token_whatever_the_draft_says(monkeypatch):
    tokens = MODEL.spec.tokens.model_copy(update={"im_end": PLAIN.token_ids[4]})
    monkeypatch.setattr(MODEL.backbone, "spec", MODEL.spec.model_copy(update={"tokens": tokens}))
    monkeypatch.setattr(MODEL, "spec", MODEL.backbone.spec)
    expected = PLAIN.token_ids[: PLAIN.token_ids.index(tokens.im_end) + 1]
    for draft in ([], PLAIN.token_ids, expected[:-1], [*expected[:-1], 5, 6]):
        assert passes(draft)[0].token_ids == expected


MEASURE = """
import os, sys
from functools import partial
from pathlib import Path
import torch
from chatvla_edge.export import exporter
from chatvla_edge.export.checkpoint.names import Layout
from chatvla_edge.export.checkpoint.reader import open_checkpoint
from chatvla_edge.export.checkpoint.synth import PRESETS, synthesize
from chatvla_edge.export.robots import load

torch.set_num_threads(1)
small, layout, _ = PRESETS["tiny"]
language = small.language.model_copy(
    update={"hidden": 512, "heads": 8, "head_dim": 64, "mrope_section": (8, 12, 12), "intermediate": 2048, "layers": 6,
            "vocab": 16384, "experts": small.language.experts.model_copy(update={"routed": 4})})
head = small.head.model_copy(update={"cond_dim": 512})
large = small.model_copy(update={"language": language, "head": head})

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def export(spec, place):
    synthesize(place / "c", spec, layout)
    settings = exporter.Settings("cpu", "int8", load("arx_r5_bimanual"), max_reasoning=4, probes=1)
    exporter.export(open_checkpoint(place / "c"), place / "b", settings, lambda name, count: None)

exporter.streamed = partial(exporter.streamed, held=4 << 20)
place = Path(sys.argv[1])
(place / "small").mkdir()
(place / "large").mkdir()
export(small, place / "small")  # libraries, kernels and thread stacks are not what is measured
before = status("VmRSS")
synthesize(place / "large/c", large, layout)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
settings = exporter.Settings("cpu", "int8", load("arx_r5_bimanual"), max_reasoning=4, probes=1)
checkpoint = open_checkpoint(place / "large/c")
planned = exporter.plan(checkpoint, settings)
exporter.export(checkpoint, place / "large/b", settings, lambda name, count: None)
stored = sum(graph.weight_bytes for graph in planned.graphs)
largest = max(4 * entry.nbytes // entry.dtype.itemsize for entry in checkpoint.entries.values())
parameters = sum(entry.nbytes // entry.dtype.itemsize for entry in checkpoint.entries.values())
print(status("VmHWM") - before, largest, stored, 4 * parameters)
"""


@pytest.mark.slow
def test_an_export_with_gates_takes_memory_for_its_engines_and_a_few_tensors(tmp_path):
    """The reference twice in fp32, as trained and as rounded, was what an export took before it streamed."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    grown, largest, stored, reference = map(int, out.stdout.split())
    # Engines: mapped file and packed copy. Beside them the largest tensor twice, and what rows of a pass take.
    assert grown <= 2 * stored + 2 * largest + (64 << 20), (grown, largest, stored, reference)
    assert 2 * stored + 2 * largest + (64 << 20) < 2 * reference, "or the bound says nothing"
