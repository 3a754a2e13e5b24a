"""The manifest: every field is asked for, every field is checked, and what two fields say of one thing agrees."""

import json
import typing

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from support import bundles
from support.bundles import at, path, places, put

from chatvla_edge.runtime.bundle import (
    BundleError,
    CenterCrop,
    Jpeg,
    Manifest,
    Resize,
    Rotate180,
    Step,
    describe,
    lines,
    size_after,
)
from chatvla_edge.runtime.bundle.text import decode, encode
from chatvla_edge.runtime.bundle.values import parsed_version

TABLES = {"pose": bundles.manifest(), "joints": bundles.manifest_of_joints()}
EVERY_PLACE = [(kind, place) for kind, table in TABLES.items() for place in places(table)]
ONCE_EACH = list(
    {tuple(str(key) for key in place if isinstance(key, str)): (kind, place) for kind, place in EVERY_PLACE}.values()
)


def named(case):
    kind, place = case
    return f"{kind}:{'.'.join(map(str, place))}"


def load(table) -> Manifest:
    return decode(bundles.sealed(table), "manifest.json")[0]


def refused(table) -> str:
    with pytest.raises(BundleError) as caught:
        load(table)
    assert str(caught.value).startswith("manifest.json: ")
    return str(caught.value)


@pytest.mark.parametrize("kind", TABLES)
def test_a_manifest_comes_back_as_it_was(kind):
    manifest = load(TABLES[kind])
    assert json.loads(manifest.model_dump_json()) == TABLES[kind]
    again, seal = decode(encode(manifest), "again")
    assert again == manifest
    assert encode(manifest) == encode(again) == bundles.sealed(TABLES[kind])
    assert seal == json.loads(encode(manifest))["seal"]


def test_floats_come_back_to_the_last_bit():
    table = put(TABLES["pose"], path("timing.rate_hz"), 0.1 + 0.2)
    table = put(table, path("normalization.state_mean.3"), 0.10000000149011612)  # float32(0.1)
    table = put(table, path("normalization.state_mean.4"), -0.0)
    manifest = load(table)
    again = decode(encode(manifest), "again")[0]
    assert again.timing.rate_hz == 0.1 + 0.2
    assert again.normalization.state_mean[3] == 0.10000000149011612
    assert str(again.normalization.state_mean[4]) == "-0.0"


def fields_of(annotation, seen: set) -> None:
    """Every (model, field) that can stand in a manifest."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if (annotation, name) not in seen:
                seen.add((annotation, name))
                fields_of(field.annotation, seen)
    for argument in typing.get_args(annotation):
        fields_of(argument, seen)


def fields_in(value, seen: set) -> None:
    """Every (model, field) that stands in this one."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            seen.add((type(value), name))
            fields_in(getattr(value, name), seen)
    elif isinstance(value, typing.Mapping):
        for inner in value.values():
            fields_in(inner, seen)
    elif isinstance(value, tuple):
        for inner in value:
            fields_in(inner, seen)


def test_the_two_examples_hold_every_field_of_every_model():
    possible, there = set(), set()
    fields_of(Manifest, possible)
    for table in TABLES.values():
        fields_in(load(table), there)
    assert len(possible) > 150
    assert {(model.__name__, name) for model, name in possible - there} == set()


NOT_A = {
    str: ({"surprise": 1}, ["surprise"], 1, True),
    int: ({"surprise": 1}, ["surprise"], "1", 1.5, True, -(2**70)),
    float: ({"surprise": 1}, ["surprise"], "1.0", True),
    bool: ({"surprise": 1}, ["surprise"], "true", 1),
    list: ({"surprise": 1}, "surprise", 1),
    dict: (["surprise"], "surprise", 1),
    type(None): ({"surprise": 1}, ["surprise"], True),
}


@pytest.mark.parametrize("case", ONCE_EACH, ids=named)
def test_every_field_refuses_what_is_not_its_kind(case):
    kind, place = case
    value = at(TABLES[kind], place)
    for wrong in NOT_A[type(value)]:
        assert [key for key in place if isinstance(key, str)][-1] in refused(put(TABLES[kind], place, wrong))


@pytest.mark.parametrize("case", ONCE_EACH, ids=named)
def test_no_field_may_be_missing(case):
    kind, place = case
    if not isinstance(place[-1], str) or place[-1] in ("swapped", "about") or place[-2:-1] == ("tools",):
        return
    table = json.loads(json.dumps(TABLES[kind]))
    del at(table, place[:-1])[place[-1]]
    assert place[-1] in refused(table)


@pytest.mark.parametrize(
    "case", [case for case in ONCE_EACH if isinstance(at(TABLES[case[0]], case[1]), dict)], ids=named
)
def test_no_field_may_be_added(case):
    kind, place = case
    assert "surprise" in refused(put(TABLES[kind], (*place, "surprise"), 1))


@pytest.mark.parametrize("case", EVERY_PLACE, ids=named)
def test_a_plausible_edit_of_any_value_breaks_the_seal(case):
    kind, place = case
    value = at(TABLES[kind], place)
    if isinstance(value, bool):
        edited = not value
    elif isinstance(value, int):
        edited = value + 1
    elif isinstance(value, float):
        edited = value * 1.0000001 if value else 1e-9
    elif isinstance(value, str):
        edited = value[:-1] + ("0" if value[-1] != "0" else "1")
    else:
        return
    text = bundles.sealed(TABLES[kind])
    table = put(json.loads(text), place, edited)
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        decode(json.dumps(table).encode(), "manifest.json")


POSE_TWICE = [*bundles.SEMANTICS["action"][:2], *bundles.SEMANTICS["action"][:2], bundles.GRIPPER]
JOINTS = {"kind": "joint_positions", "arm": "right", "joints": ["a"], "unit": "rad", "motion": "absolute"}
HALF_A_POSE = [bundles.SEMANTICS["action"][0], bundles.GRIPPER]
BOTH = [*bundles.SEMANTICS["action"], JOINTS]

DISAGREEMENTS = [
    ("geometry.head.action_dim", 11, "semantics.action has 10 components, geometry.head.action_dim is 11"),
    ("geometry.head.state_dim", 8, "semantics.state has 7 components, geometry.head.state_dim is 8"),
    ("geometry.head.cond_dim", 63, "head.cond_dim is 63"),
    ("geometry.head.heads", 3, "does not divide over 3"),
    ("geometry.head.reasoning.stop", 5, "reasoning blocks 2..5"),
    ("geometry.language.mrope_section", [1, 1, 1], "sums to 3"),
    ("geometry.language.kv_heads", 3, "do not divide over 3"),
    ("geometry.language.layers", 4, "4 layers need 8"),
    ("prompt.tokens.endoftext", 320, "prompt.tokens names the id 320"),
    ("geometry.language.max_positions", 127, "the model knows 127 positions"),
    ("geometry.language.experts.top_k", 9, "top_k is 9 of 8"),
    ("geometry.language.experts.top_k", 0, "top_k is 0 of 8"),
    ("geometry.language.experts.routed", 0, "top_k is 2 of 0"),
    ("geometry.language.experts.static_active", 1, "static_active is 1 of 0"),
    (
        "geometry.language.experts",
        {**bundles.GEOMETRY["language"]["experts"], "shared": 0, "shared_gate": True},
        "shared",
    ),
    ("geometry.language.experts.scoring", "sigmoid", "geometry.language.experts.scoring"),
    ("semantics.arms", bundles.SEMANTICS["arms"] * 2, "two arms have one name"),
    ("semantics.arms.0.name", "left", "speaks of the arm 'right'"),
    ("semantics.arms.0.flange_to_tcp", None, "flange_to_tcp is not stated"),
    ("semantics.arms.0.flange_to_tcp.quaternion_wxyz", [1.0, 1.0, 0.0, 0.0], "length 1.414214"),
    ("semantics.action.1.unit", "rad", "has the unit '1', found 'rad'"),
    ("semantics.action.1.codec", "quaternion_wxyz", "semantics.action has 8 components"),
    ("semantics.action", POSE_TWICE, "right.rotation_0"),
    ("semantics.action", HALF_A_POSE, "half a pose"),
    ("semantics.action", BOTH, "both joints and pose"),
    ("timing.first_step", 16, "beyond the horizon"),
    ("timing.pairing", "whenever", "timing.pairing: found 'whenever'"),
    ("normalization.state_std.2", 0.0, "components [2] are not"),
    ("normalization.action_max.9", -1.0, "components [9] it does not"),
    ("normalization.state_mean", [0.5] * 6, "state_mean has 6"),
    ("normalization.action_min", [-1.0] * 9, "action_min has 9"),
    ("normalization.state_mean.0", 0.1, "0.1 is no float32; the nearest is 0.10000000149011612"),
    ("normalization.state_mean.0", 1e39, "is no float32"),
    ("pixels.std.1", 0.0, "std must be positive"),
    ("cameras.0.grid", [6, 4], "its grid of 6 x 4"),
    ("cameras.0.preprocessing.2.height", 55, "ends at 55 x 84"),
    ("cameras.0.height", 1, "the step center_crop leaves 0 x 608"),
    ("cameras.1.name", "right", "two cameras have one name"),
    ("cameras", bundles.contents()["cameras"][:1], "the vision stage for the grid (4, 4) serves no camera"),
    ("stages.vision.1.grid", [4, 6], "two vision stages serve one grid"),
    ("stages.vision.1.grid", [6, 4], "no vision stage for its grid of 4 x 4"),
    ("stages.vision.1.file", "stages/vision_4x6.onnx", "two stages have one file"),
    ("stages.language.kv.capacity", 256, "expected [1, 2, 256, 16]"),
    ("stages.language.kv.past.0", "past", "no input"),
    ("stages.language.kv.present.0", "present", "no output"),
    ("stages.language.kv.past.0", "past_value_0", "past_value_0 twice"),
    ("stages.language.kv.past", ["past_key_0"], "1 tensors of past, 6 of present"),
    ("stages.language.kv.dtype", "float16", "kv.dtype is float16"),
    ("stages.language.inputs.4.shape", [1, 2, 128, 17], "'past_key_0' has the shape [1, 2, 128, 17]"),
    ("stages.language.inputs.1.name", "embeddings", "inputs name embeddings twice"),
    ("stages.language.embeddings.shape", [320, 63], "embeddings has the shape [320, 63]"),
    ("stages.language.dims.rows.min", 65, "min <= typical <= max"),
    ("stages.language.inputs.0.shape.0", "lines", "the shapes use the symbols"),
    ("sampler.steps.0.signal", 0.7, "power 1"),
    ("sampler.steps.0.next_signal", 0.7, "the next begins at (0.8, 0.6)"),
    ("sampler.steps.1.next_noise", 0.1, "the next begins at (1.0, 0.0)"),
    ("sampler.steps.1.timestep", 50, "timesteps must fall"),
    ("sampler.steps.0.timestep", 100, "outside the 100 training steps"),
    ("prompt.template", "{instruction}{images}", "expected {images} and then {instruction}"),
    ("prompt.template", "{images}{instruction}{instruction}", "once each"),
    ("prompt.tokens.stop", [320], "the id 320"),
    ("prompt.max_reasoning_tokens", 118, "leave no room"),
    ("target.engine.kind", "tensorrt", "runs on onnxruntime"),
    ("target.engine.at_least", "1.24", "not itself within 1.24 or newer, below 2"),
    ("target.engine.below", "1.23.2", "not itself within"),
    ("target.sm", [87], "no compute capability"),
    ("target.jetpack", "7.2", "belongs to JetPack None"),
    ("target.name", "orin-jp62", "target.name: found 'orin-jp62'"),
    ("plugin", ["plugin/moe.cu"], "loads no plugin"),
    ("gates.allowed_failed_gates", [], "['denoise/rms'] failed and were not allowed"),
    ("gates.allowed_failed_gates", ["denoise/rms", "language/rms"], "['language/rms'] are allowed to fail but did not"),
    ("gates.results.1.name", "language/rms", "two results have the name"),
    ("tokenizer", "parity.json", "serves as tokenizer and as parity"),
    ("probes", ["probes/observation.npz"] * 2, "stands twice"),
    ("stages.vision.0.data", ["stages/vision_4x6.onnx"], "serves as graph of vision[4x6] and as data"),
    ("documents", [], "lists 'documents/LICENSE', which nothing refers to"),
    ("documents", ["documents/NOTICE"], "refers to 'documents/NOTICE', which `files` does not list"),
    (("files", "stages/embeddings.bin", "size"), 40961, "has 40961 bytes, a table [320, 64] float16 has 40960"),
]


@pytest.mark.parametrize(
    ("where", "value", "message"), DISAGREEMENTS, ids=[f"{w}-{i}" for i, (w, _, _) in enumerate(DISAGREEMENTS)]
)
def test_a_disagreement_is_named(where, value, message):
    assert message in refused(put(TABLES["pose"], path(where) if isinstance(where, str) else where, value))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("target.sm", [110], "compute capability (87,), found (110,)"),
        ("target.sm", [], "compute capability"),
        ("target.jetpack", "6.2", "JetPack 7.2, found 6.2"),
        ("target.engine.kind", "onnxruntime", "runs on tensorrt"),
    ],
)
def test_a_jetson_target_promises_its_machine(where, value, message):
    assert message in refused(put(TABLES["joints"], path(where), value))


def test_graphs_of_two_grids_may_share_their_weights():
    table = put(TABLES["pose"], path("stages.vision.1.data"), ["stages/vision_4x6.onnx.data"])
    assert load(table).stages.vision[1].files[1] == "stages/vision_4x6.onnx.data"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../secret", "a/../../b", "a/..", "./a", ".", "..", "", "a//b", "a/", "/", "a\\b", "..\\b",
        "a\0b",
        "a\nb", "a b", "na\u00efve", "a\u202eb", "\uff41", "a/\uff0e\uff0e/b", "~root", "C:x",
        ".hidden", "a/.git/b", "trailing.", "a./b",
        "a/b/c/d/e/f/g", "x" * 128, "manifest.json", "MANIFEST.json", "a*", "a%2e", "file:///x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["tokenizer", "stages.denoise.file", "probes.0"])
def test_a_name_that_could_leave_the_bundle_is_refused(where, name):
    table = put(TABLES["pose"], path(where), name)
    table["files"][name] = table["files"]["tokenizer.json"]
    message = refused(table)
    assert where.split(".")[0] in message
    assert repr(name)[1:-1] in message or ascii(name)[1:-1] in message or "max" in message or "at most" in message


def test_a_name_that_only_the_file_list_holds_is_checked_too():
    table = put(TABLES["pose"], ("files", "../secret"), TABLES["pose"]["files"]["tokenizer.json"])
    assert "'../secret' could leave the bundle" in refused(table)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["documents/a", "documents/A"], "differ in case alone"),
        (["documents/x/a", "documents/X/b"], "differ in case alone"),
        (["documents/x", "documents/x/a"], "is a file and a folder"),
        (["documents/X", "documents/x/a"], "is a file and a folder"),
    ],
)
def test_names_that_some_file_system_takes_for_one_are_refused(names, message):
    table = put(TABLES["pose"], path("documents"), [*TABLES["pose"]["documents"], *names])
    table["files"] |= {name: {"sha256": "0" * 64, "size": 0} for name in names}
    assert message in refused(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"null", "a JSON NoneType"),
        (b"[]", "a JSON list"),
        (b'"' + b"x" * 100, "no JSON"),
        (b"\xff\xfe{}", "no UTF-8"),
        (b"\x80\x04}.", "no UTF-8"),  # an empty dict, pickled
        (b'{"format": NaN}', "the literal NaN"),
        (b'{"format": -Infinity}', "the literal -Infinity"),
        (b'{"format": 1e999}', "beyond every float"),
        (b'{"format": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"format": 1, "format": 2}', "the key 'format' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        (b"[" * 100000, "nested brackets"),
        (b'{"a":' * 100000, "nested brackets"),
        (bundles.sealed(put(TABLES["pose"], ("tokenizer",), "\ud800")), "no Unicode"),
        (b'{"format": "onnx"}', "the format 'onnx'"),
        (b'{"format": "chatvla-edge-bundle"}', "schema_version None"),
        (b'{"format": "chatvla-edge-bundle", "schema_version": "1"}', "schema_version '1'"),
        (b'{"format": "chatvla-edge-bundle", "schema_version": true}', "schema_version True"),
        (b'{"format": "chatvla-edge-bundle", "schema_version": 2}', "found schema_version 2, this reads 1: upgrade"),
        (b'{"format": "chatvla-edge-bundle", "schema_version": 0}', "made by an older version: found schema_version 0"),
        (b" " * (4 * 2**20 + 1), "more than 4194304 bytes"),
        (b'"' + b'\\"' * 2**20, "no JSON"),  # quadratic for a scanner that starts over
        (b'{"a": "' + b"{[" * 2**20 + b'"}', "the format None"),  # brackets inside a string do not nest
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_text_that_is_no_manifest_is_refused(text, message):
    with pytest.raises(BundleError) as caught:
        decode(text, "manifest.json")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_wrong_seal_is_named():
    table = {**TABLES["pose"], "seal": "0" * 64}
    with pytest.raises(BundleError, match=r"the seal '000.*export it anew"):
        decode(json.dumps(table).encode(), "manifest.json")
    with pytest.raises(BundleError, match="the seal None"):
        decode(json.dumps(TABLES["pose"]).encode(), "manifest.json")


def test_white_space_and_order_are_not_sealed():
    table = json.loads(bundles.sealed(TABLES["pose"]))
    shuffled = json.dumps(dict(reversed(table.items())), indent=7).encode()
    assert decode(shuffled, "m") == decode(bundles.sealed(TABLES["pose"]), "m")


def test_many_wrong_fields_make_a_short_message():
    table = put(TABLES["pose"], path("documents"), [1] * 50)
    message = refused(table)
    assert message.count("documents.") == 5
    assert "and 45 more" in message


def test_a_manifest_cannot_be_changed():
    manifest = load(TABLES["pose"])
    with pytest.raises(ValidationError):
        manifest.tokenizer = "x"
    with pytest.raises(TypeError):
        manifest.files["x"] = None


def test_a_stage_is_known_by_all_that_its_engine_reads():
    first = load(TABLES["pose"])
    digest = first.stage_digest(first.stages.language)
    for file in ("stages/language.onnx", "stages/language.onnx.data", "stages/embeddings.bin"):
        other = load(put(TABLES["pose"], ("files", file, "sha256"), "a" * 64))
        assert other.stage_digest(other.stages.language) != digest
        assert other.stage_digest(other.stages.denoise) == first.stage_digest(first.stages.denoise)


def test_steps_say_what_they_do_to_a_size():
    crop = CenterCrop(ratio=0.95)
    assert crop.rows_and_columns(480, 640) == (slice(12, 468), slice(16, 624))
    steps = (Jpeg(quality=70), crop, Rotate180(), Resize(height=28, width=56, filter="bicubic"))
    assert size_after(steps[:1], 480, 640) == (480, 640)
    assert size_after(steps[:3], 480, 640) == (456, 608)
    assert size_after(steps, 480, 640) == (28, 56)


def test_steps_are_told_apart_by_their_name():
    adapter = TypeAdapter(Step)
    assert adapter.validate_python({"step": "rotate_180", "about": "pixel"}) == Rotate180(about="pixel")
    with pytest.raises(ValidationError):
        adapter.validate_python({"step": "sharpen"})


def test_versions_compare_as_numbers():
    assert parsed_version("1.23.0+cpu") == parsed_version("1.23") == (1, 23)
    assert parsed_version("1.9") < parsed_version("1.10") < parsed_version("1.10.0.1")
    assert parsed_version("nightly") == ()


@pytest.mark.parametrize("kind", TABLES)
def test_a_description_is_json_and_says_what_matters(kind):
    manifest = load(TABLES[kind])
    description = describe(manifest, "f" * 64)
    assert json.loads(json.dumps(description)) == description
    text = "\n".join(lines(description))
    for word in ("first_step: -1", "as_recorded", "precision: int8", "larger_", "f" * 64, manifest.target.name):
        assert word in text
    if kind == "pose":
        assert "allowed_failed_gates: denoise/rms" in text
        assert "rot6d_rows_intrinsic_xyz_read_as_extrinsic" in text
