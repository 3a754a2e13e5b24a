"""Rig files: those that come along are good, and whatever is wrong with one is said with file, line and path."""

import json
import re
from itertools import pairwise

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatvla_edge.drivers import registry, rig, yaml_source
from chatvla_edge.drivers.rig import RigError

ARX = rig.find("sim_arx_r5_bimanual").read_text()
FRANKA = rig.find("sim_franka_robotiq").read_text()

SENTENCE = re.compile(r"f\.yaml:[1-9]\d*: (the file|\S.*): \S.*")


def refused(text, where="f.yaml"):
    """The lines of the refusal."""
    with pytest.raises(RigError) as error:
        rig.parse(text, where)
    return str(error.value).splitlines()


def changed(text, before, after):
    assert before in text
    return text.replace(before, after, 1)


def line_of(text, what):
    return text[: text.index(what)].count("\n") + 1


# ------------------------------------------------------------------------------------------------ rigs that come along


def drivers_of(name):
    values = yaml_source.read(rig.find(name).read_text()).values
    yield from (("cameras", device["driver"]) for device in values["cameras"].values())
    yield from (("arms", device["driver"]) for device in values["arms"].values())


@pytest.mark.parametrize("name", rig.names())
def test_a_rig_that_comes_along_is_good(name):
    missing = [driver for role, driver in drivers_of(name) if driver not in registry.known(role)]
    if missing:
        pytest.skip(f"no driver {', '.join(missing)} in this tree")
    assert rig.load(name).name == name


@pytest.mark.parametrize("name", ["arx_r5_bimanual", "franka_robotiq"])
def test_a_twin_differs_in_its_devices_only(name):
    def shape(which):
        values = yaml_source.read(rig.find(which).read_text()).values
        for device in (*values["cameras"].values(), *values["arms"].values()):
            device.pop("driver", None)  # two names may stand for one mapping
            device.pop("options", None)
        return {key: value for key, value in values.items() if key not in ("name", "description", "simulated")}

    assert shape(name) == shape(f"sim_{name}")


def test_only_what_is_simulated_says_so():
    for name in rig.names():
        assert yaml_source.read(rig.find(name).read_text()).values.get("simulated", False) is name.startswith(
            ("sim_", "standin_", "tabletop", "mujoco_")
        )


def test_a_rig_is_found_by_name_or_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(ARX)
    assert rig.load(str(file)) == rig.load("sim_arx_r5_bimanual")
    with pytest.raises(RigError, match="found no rig file"):
        rig.load(str(tmp_path / "other.yaml"))
    with pytest.raises(RigError, match=r"expected a YAML file or one of: .*sim_arx_r5_bimanual"):
        rig.load("sim_arx")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"schema: \xff\xfe")
    with pytest.raises(RigError, match=r"mine.yaml:1: the file: no UTF-8"):
        rig.load(str(file))


# ------------------------------------------------------------------------------------------------------- what is wrong

WRONG = {
    # what is changed into what, and the path and words of the one sentence about it
    "a misspelt name": ("    rate: 60", "    rat: 60", "cameras.right.rat", "did you mean 'rate'?"),
    "a text for a number": ("    rate: 60", "    rate: sixty", "cameras.right.rate", "found 'sixty'"),
    "a truth for a number": ("    rate: 60", "    rate: true", "cameras.right.rate", "found True"),
    "no number": ("    rate: 60", "    rate: .nan", "cameras.right.rate", "found nan"),
    "another schema": ("schema: 1", "schema: 2", "schema", "found 2"),
    "an unknown driver": ("driver: sim_camera", "driver: toaster", "cameras.right.driver", "found the cameras driver"),
    "an unknown option": ("{latency: 0.04}", "{latncy: 0.04}", "cameras.right.options.latncy", "mean 'latency'?"),
    "an option out of range": ("{latency: 0.04}", "{latency: 40}", "cameras.right.options.latency", "found 40"),
    "options that disagree": ("start: [0.0,", "start: [9.0,", "arms.franka.options", "start has joint1 at 9.0"),
    "a number too many": ("velocity: [1.9,", "velocity: [1, 1.9,", "arms.franka.limits.velocity", "found 8 numbers"),
    "a pose too short": ("home: [0.085]", "home: []", "arms.gripper.home", "found 0 numbers, expected 1"),
    "wider than the vendor": ("[1.9, 1.0", "[1.9, 3.0", "arms.franka.limits.velocity.1", "2.62 or less"),
    "lower than the vendor": ("lower: [-2.3", "lower: [-2.8", "arms.franka.limits.lower.0", "-2.7437 or more"),
    "harder than the vendor": ("n: [7.0, 5", "n: [11.0, 5", "arms.franka.limits.acceleration.0", "10 or less"),
    "no speed": ("velocity: [0.15]", "velocity: [0.0]", "arms.gripper.limits.velocity.0", "expected more than 0"),
    "limits upside down": ("lower: [0.0]", "lower: [0.085]", "arms.gripper.limits.lower.0", "expected less than"),
    "home outside": ("home: [0.085]", "home: [-0.1]", "arms.gripper.home.0", "expected 0 to 0.085"),
    "an opening outside": ("open: 0.085", "open: 0.09", "arms.gripper.gripper.open", "expected 0 to 0.085"),
    "open where closed": ("open: 0.085", "open: 0.0", "arms.gripper.gripper.open", "expected another"),
    "a gripper of nobody": ("of: franka", "of: frank", "arms.gripper.of", "expected one of: franka"),
    "a gripper that says not whose": ("    of: franka\n", "", "arms.gripper.of", "found none"),
    "a gripper without positions": ("    gripper: {", "    cores: {", "arms.gripper.cores", "no such name"),
    "a box upside down": ("box: [0.2", "box: [0.9", "arms.franka.limits.workspace.box", "at least, then at most"),
    "a workspace without chain": ("    chain: fr3\n", "", "arms.franka.chain", "needs them"),
    "faster than the servo": ("  rate: 500\n\np", "  rate: 100\n\np", "arms.franka.rate", "at most the servo's 100"),
    "actions faster than ticks": ("  rate: 15", "  rate: 900", "policy.rate", "at most the servo's 500"),
    "a state too young to be": ("max_age: 0.2", "max_age: 0.03", "arms.gripper.max_age", "more than two periods"),
    "a frame too young to be": ("    rate: 60", "    max_age: 0.01\n    rate: 60", "cameras.right.max_age", "0.0167 s"),
    "chunks too young to be": (
        "servo:", "servo:\n  chunk_max_age: 0.4", "servo.chunk_max_age", "every chunk would be too old"
    ),
    "sync without a number": ("servo:", "servo:\n  fusion: sync", "servo.sync_actions", "expected 1 or more"),
    "a stretched picture": ("height: 720", "height: 960", "cameras.right.native", "stretched"),
    "a native size that is none": (
        "{height: 720, width: 1280", "{height: 270, width: 480", "cameras.right.native", "leave it out"
    ),
    "a servo that shares its core": (
        "servo:", "cores: {servo: [2, 3], policy: [3, 4]}\nservo:", "cores.servo", "shares CPU 3"
    ),
    "a core below zero": ("servo:", "cores: {devices: [-1]}\nservo:", "cores.devices.0", "found CPU -1"),
    "a switch that nobody knows": ("servo:", "enable: {driver: knob}\nservo:", "enable.driver", "found the enable"),
    "a name that stands twice": ("  gripper:\n", "  franka:\n", "arms.franka", "a second time, first on line"),
    "no device at all": ("cameras:\n  right:", "cameras: {}\nother:\n  right:", "cameras", "at least 1"),
    "a name with a blank": ("  gripper:\n", "  the gripper:\n", "arms.'the gripper'", "match pattern"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_line_and_path(what):
    before, after, path, words = WRONG[what]
    text = changed(FRANKA, before, after)
    sentences = refused(text)
    assert all(SENTENCE.fullmatch(sentence) for sentence in sentences), sentences
    said = [sentence for sentence in sentences if f": {path}" in sentence and words in sentence]
    assert len(said) == 1, sentences


@pytest.mark.parametrize(
    ("before", "after", "where"),
    [
        ("    rate: 60", "    rat: 60", "rat: 60"),
        ("home: [0.085]", "home: [0.2]", "home: [0.2]"),
        ("jerk: [50.0]", "jerk: [1, 2]", "jerk: [1, 2]"),
        ("    of: franka\n", "", "  gripper:\n"),
        ("latency: 0.04", "latency: 40", "options: {latency"),
    ],
)
def test_the_line_is_that_of_the_value_or_of_what_it_is_missing_from(before, after, where):
    text = changed(FRANKA, before, after)
    lines = {int(sentence.split(":")[1]) for sentence in refused(text)}
    assert line_of(text, where) in lines


def test_everything_wrong_is_said_at_once():
    text = changed(changed(FRANKA, "home: [0.085]", "home: [7]"), "of: franka", "of: nobody")
    assert len(refused(text)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found None"),
        ("- 1", "found \\[1\\]"),
        ("a: [1", "no YAML"),
        ("a: *b", "undefined alias"),
        ("1: 2", "found the name '1'"),
        ("? [a]\n: 2", "found the name 'a list or mapping'"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: \t\x00", "no YAML"),
        ("[" * 700, "without end"),
        ("a: &a [*a]", "levels"),
        ("a: &a [1,2]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in pairwise("abcdefghij")), "more than"),
    ],
)  # fmt: skip
def test_what_is_no_rig_at_all_is_refused(text, words):
    assert re.search(words, "\n".join(refused(text)))


def test_a_part_said_once_serves_for_two_arms():
    left, right = rig.parse(ARX, "f.yaml").arms.values()
    assert left == right


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", "yes"), ("on", "on"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("0x10", "0x10"), ("1e-3", 1e-3),
     ("-.5", -0.5), ("12", 12), ("+1.5E+3", 1500.0), ("true", True), ("~", None), ("", None), ("1_0", "1_0")],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = yaml_source.read(f"a: {text}").values["a"]
    assert (type(read), read) == (type(value), value)


# ---------------------------------------------------------------------------------------------------------------- fuzz

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), st.text(max_size=4), st.just([]), st.just({}),
    st.lists(st.floats(-4, 4), max_size=8), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["sim_arm", "sim_gripper", "sim_camera", "franka", "sync", "fr3", "arx_r5", 1e308, -0.0, 10**400]),
)  # fmt: skip


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def judged(text):
    """Good, or refused with a place in every line; nothing else comes out."""
    try:
        rig.parse(text, "f.yaml")
    except RigError as error:
        for sentence in str(error).splitlines():
            assert SENTENCE.fullmatch(sentence), sentence


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), base=st.sampled_from([ARX, FRANKA]))
def test_a_mutated_rig_is_good_or_refused_with_a_place(data, base):
    values = json.loads(json.dumps(yaml_source.read(base).values))  # a tree: no two arms share their parts
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(values))[1:]))
        holder = values
        for key in path[:-1]:
            holder = holder[key]
        what = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            holder[path[-1]] = data.draw(SCALARS)
        elif what == "remove":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.insert(path[-1], data.draw(SCALARS))
        else:
            holder[data.draw(st.text(max_size=6))] = data.draw(SCALARS)
        if not values:
            break
    judged(yaml.safe_dump(values, allow_unicode=True))


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([ARX, FRANKA]),
    at=st.floats(0, 1, exclude_max=True),
    length=st.integers(0, 30),
    inserted=st.text(max_size=8) | st.text(alphabet="[]{}:,-&*!|>'\"%@`#? \n\t0", max_size=8),
)
def test_a_damaged_text_is_good_or_refused_with_a_place(base, at, length, inserted):
    start = int(at * len(base))
    judged(base[:start] + inserted + base[start + length :])
