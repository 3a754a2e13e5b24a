"""Every gate fails where its own fault is planted, says so in words, and no gate of another stage does."""

import numpy as np
import pytest
from support import faults
from support.faults import HEAD, VISION
from support.small_cameras import camera

from chatvla_edge.export.bisect import bisect
from chatvla_edge.export.exporter import GateError
from chatvla_edge.export.lower.onnxruntime import PRECISIONS
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.probes import dequantized, observation, scenes
from chatvla_edge.runtime.bundle import Resize
from chatvla_edge.runtime.gates import MEANING, gates_of, judge, meaning, read_probe
from chatvla_edge.runtime.prompt import PromptBuilder
from chatvla_edge.runtime.reasoning import PromptRows

# The gates that feed their stage the reference's own inputs: what fails in one of them was made there.
BY_THEMSELVES = {
    "preprocessing",
    "prompt",
    "state",
    "vision",
    "cameras",
    "language",
    "rows",
    "condition",
    "denoise",
    "units",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return faults.checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", sharpness=2)


@pytest.fixture(scope="module", params=PRECISIONS)
def honest(request, checkpoint, tmp_path_factory):
    """An honest bundle of two cameras and its probes."""
    folder = tmp_path_factory.mktemp(request.param)
    bundle = faults.export(checkpoint, folder / "b", request.param, cameras=("top", "wrist"))
    return bundle, {name: read_probe(bundle.read(name)) for name in bundle.manifest.probes}


def failures(bundle, contents, probes):
    """Gate -> what its failure says."""
    return {
        result.name.removeprefix("lowering_parity/"): meaning(result)
        for result in judge(bundle.path, contents, probes)
        if result.verdict == "failed"
    }


def alone(found):
    """Failed gates that stand for one stage."""
    return {name.split("/")[0] for name in found} & BY_THEMSELVES


def test_an_honest_bundle_fails_none(honest):
    bundle, probes = honest
    assert failures(bundle, bundle.manifest, probes) == {}


def test_every_gate_has_a_meaning(honest):
    bundle, probes = honest
    results = judge(bundle.path, bundle.manifest, probes)
    assert {result.name.split("/")[1] for result in results} == set(MEANING) - {"parts"}
    stated = {result.name for result in bundle.manifest.gates.results}
    parts = {f"lowering_parity/parts/{part}" for part in ("vision", "language", "routing", "condition", "denoise")}
    assert stated == {result.name for result in results} | parts
    assert all(meaning(result) for result in results)


PLANTED = {
    "experts rotated": (faults.experts_rotated(8), "language", "experts"),
    "top-1 for top-2": (faults.believed(top_k=1), "language", "experts"),
    "softmax before the choice, not after": (faults.believed(renormalize=False), "language", "their weights"),
    "rotary sections": (faults.believed(mrope_section=(1, 3, 4)), "language", "rotary positions"),
    "a vision map transposed": (faults.transposed(f"{VISION}.1.attn.proj.weight"), "vision", "the vision stage"),
    "a projector transposed": (faults.transposed("fusion.input_projector.2.weight"), "condition", "condition stage"),
    "a head's map transposed": (faults.transposed(f"{HEAD}.1.attn.proj.weight"), "denoise", "denoise stage"),
    "actions one further": (faults.rolled("head.final_layer.linear.weight"), "denoise", "denoise stage"),
}


# Rounded activations hide a small fault of one layer from a whole stage, not from the parts.
ROUNDED = ["softmax before the choice, not after", "top-1 for top-2", "a head's map transposed"]


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_of_a_stage_fails_the_gates_of_that_stage(fault, honest, checkpoint, tmp_path, monkeypatch):
    right, probes = honest
    change, stage, words = PLANTED[fault]
    precision = right.manifest.stages.language.precision
    if precision != "fp32" and fault not in ROUNDED:
        pytest.skip("shown in fp32")
    with faults.planted(change, monkeypatch):
        bundle = faults.export(checkpoint, tmp_path / "b", precision, cameras=("top", "wrist"), gates=False)
    held, observed = reference(checkpoint, precision)
    parts = gates_of(bisect(bundle.path, bundle.manifest, held, observed))
    assert [gate.name for gate in parts if gate.verdict == "failed"] == [f"lowering_parity/parts/{stage}"]
    if precision == "fp32":
        found = failures(bundle, bundle.manifest, probes)
        assert alone(found) == {stage}
        assert all(words in said for name, said in found.items() if name.split("/")[0] == stage)


def test_the_router_has_gates_of_its_own(honest, checkpoint, tmp_path, monkeypatch):
    right, probes = honest
    precision = right.manifest.stages.language.precision
    with faults.planted(faults.rolled(f"{faults.LANGUAGE}.0.mlp.router.weight"), monkeypatch):
        bundle = faults.export(checkpoint, tmp_path / "b", precision, cameras=("top", "wrist"), gates=False)
    found = failures(bundle, bundle.manifest, probes)
    assert alone(found) == {"language"}
    assert "the router" in found["routing"]


def reference(checkpoint, precision):
    """The model over the weights of this precision, and what it looks at."""
    normalization, cameras = checkpoint.normalization(), faults.ROBOT("top", "wrist").cameras
    (scene,) = scenes(1, [(camera.height, camera.width) for camera in cameras], normalization, 50)
    steps = {camera.name: Preprocessing(camera.preprocessing) for camera in cameras}
    observed = observation(checkpoint.spec, steps, checkpoint.prompt(), normalization, scene)
    return dequantized(checkpoint.model(), PRECISIONS[precision]), observed


def test_an_export_that_fails_names_the_layer_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    with (
        faults.planted(faults.gate_for_up("2"), monkeypatch),
        pytest.raises(
            GateError, match=r"parts/language.*first part to diverge: language, layer 2, experts\. No bundle"
        ),
    ):
        faults.export(checkpoint, tmp_path / "b", "int8")
    assert not (tmp_path / "b").exists()  # what was finished is kept beside it, under a name that nobody loads


# ------------------------------------------------------------------------------- what surrounds the stages, in fp32


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    bundle = faults.export(checkpoint, tmp_path_factory.mktemp("plain") / "b", "fp32", cameras=("top", "wrist"))
    return bundle, {name: read_probe(bundle.read(name)) for name in bundle.manifest.probes}


def edited(contents, part, **changes):
    return contents.model_copy(update={part: getattr(contents, part).model_copy(update=changes)})


def test_cameras_in_another_order_than_the_prompts_fail_by_name(plain, monkeypatch):
    from chatvla_edge.runtime import policy

    bundle, probes = plain
    see = policy._Eyes.__call__

    def exchanged(eyes, frames, seconds):
        tokens = see(eyes, frames, seconds)
        first, second = eyes.slices
        tokens[first], tokens[second] = tokens[second].copy(), tokens[first].copy()
        return tokens

    monkeypatch.setattr(policy._Eyes, "__call__", exchanged)
    found = failures(bundle, bundle.manifest, probes)
    assert alone(found) == {"vision", "cameras"}
    assert "the order of the cameras" in found["cameras"]


def test_cameras_exchanged_in_the_manifest_fail_by_name(plain):
    """Frames are known by their camera's name: the pictures follow their names, and stand in the other's place."""
    bundle, probes = plain
    top, wrist = bundle.manifest.cameras
    found = failures(bundle, bundle.manifest.model_copy(update={"cameras": (wrist, top)}), probes)
    assert alone(found) == {"vision", "cameras"}


def test_a_step_of_preprocessing_fails_for_its_camera(plain):
    bundle, probes = plain
    top, wrist = bundle.manifest.cameras
    other = Resize(step="resize", height=56, width=84, filter="bilinear_cv2")
    wrong = wrist.model_copy(update={"preprocessing": (other,)})
    found = failures(bundle, bundle.manifest.model_copy(update={"cameras": (top, wrong)}), probes)
    assert "preprocessing/wrist" in found
    assert "preprocessing/top" not in found
    assert "a step of its preprocessing" in found["preprocessing/wrist"]


def test_a_text_position_off_by_one_fails(plain, monkeypatch):
    bundle, probes = plain
    right = PromptBuilder.rows

    def off_by_one(builder, instruction):
        rows = right(builder, instruction)
        positions = rows.positions.copy()
        positions[:, rows.image_rows[-1] + 1 :] += 1
        return PromptRows(rows.ids, positions, rows.image_rows)

    monkeypatch.setattr(PromptBuilder, "rows", off_by_one)
    found = failures(bundle, bundle.manifest, probes)
    assert alone(found) == {"prompt", "language"}
    assert "prompt/ids" not in found
    assert "rotary positions" in found["prompt/positions"]


def test_another_prompt_template_fails(plain):
    bundle, probes = plain
    template = bundle.manifest.prompt.template.replace("assistant", "robot")
    found = failures(bundle, edited(bundle.manifest, "prompt", template=template), probes)
    assert "template" in found["prompt/ids"]


def test_another_normalisation_of_the_state_fails(plain):
    bundle, probes = plain
    mean = list(bundle.manifest.normalization.state_mean)
    mean[3] += 0.25
    found = failures(bundle, edited(bundle.manifest, "normalization", state_mean=tuple(mean)), probes)
    assert alone(found) == {"state", "condition"}
    assert "mean and std of the state" in found["state"]


def test_another_normalisation_of_the_actions_fails(plain):
    bundle, probes = plain
    largest = list(bundle.manifest.normalization.action_max)
    largest[3] += 0.25
    found = failures(bundle, edited(bundle.manifest, "normalization", action_max=tuple(largest)), probes)
    assert alone(found) == {"units"}
    assert "minimum and maximum of the actions" in found["units"]


def test_sampler_steps_of_another_schedule_fail(plain):
    bundle, probes = plain
    steps = bundle.manifest.sampler.steps
    wrong = (*steps[:4], steps[4].model_copy(update={"next_noise": steps[4].next_noise * 1.01}), *steps[5:])
    found = failures(bundle, edited(bundle.manifest, "sampler", steps=wrong), probes)
    assert alone(found) == {"denoise"}


def test_rows_that_depend_on_their_neighbours_fail(plain, monkeypatch):
    """An engine whose every row hears a little of the row before it: no other gate can see that."""
    from chatvla_edge.runtime import reasoning

    bundle, probes = plain
    forward = reasoning.LanguageModel.forward

    def hearing(model, ids, *args, **named):
        outputs = forward(model, ids, *args, **named)
        if len(ids) == 1:
            outputs["hidden"][:] = np.nextafter(outputs["hidden"], np.float32(9))
        return outputs

    monkeypatch.setattr(reasoning.LanguageModel, "forward", hearing)
    found = failures(bundle, bundle.manifest, probes)
    assert alone(found) == {"rows"}
    assert "drafts would change answers" in found["rows"]


def test_a_probe_of_other_cameras_is_refused(plain):
    bundle, probes = plain
    contents = bundle.manifest.model_copy(update={"cameras": (camera("left"), camera("wrist"))})
    with pytest.raises(ValueError, match=r"probes/0.npz.*of other cameras.*frame.left"):
        judge(bundle.path, contents, probes)


def test_a_value_that_is_no_number_fails(plain):
    bundle, probes = plain
    name = "lowering_parity.modulations"
    poisoned = {file: {**probe, name: np.full_like(probe[name], np.nan)} for file, probe in probes.items()}
    found = failures(bundle, bundle.manifest, poisoned)
    assert {"condition", "denoise/rms"} <= set(found)
