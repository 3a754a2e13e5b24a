"""Whatever stands in a manifest, the loader answers with a bundle or with a `BundleError`."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import bundles
from support.bundles import at, places, put

from chatvla_edge.runtime.bundle import BundleError, Machine, Manifest, RigNeeds, describe, open_bundle
from chatvla_edge.runtime.bundle.fit import check_machine, check_rig
from chatvla_edge.runtime.bundle.text import decode, encode

TABLES = [bundles.manifest(), bundles.manifest_of_joints()]
TEXTS = [bundles.sealed(table) for table in TABLES]
PLACES = [list(places(table)) for table in TABLES]
ORIGINALS = [decode(text, "m")[0] for text in TEXTS]

often = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 400),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e300, -1e300, 5e-324, -0.0, 2**31, 2**63, 2**64, 10**30, 1e16]),
)
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["../x", "/etc/passwd", "a\\b", "stages/denoise.onnx", "1.2.3", "right", "NaN", "\ud800", "rows"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(WORDS, inner, max_size=5)),
    max_leaves=10,
)


def answer(text: bytes) -> Manifest | None:
    """The manifest, or None where it was refused. Anything else that is raised fails the test."""
    try:
        manifest, seal = decode(text, "manifest.json")
    except BundleError as error:
        assert str(error).startswith("manifest.json: ")  # noqa: PT017
        assert len(str(error)) < 5000  # noqa: PT017
        return None
    # What is taken is usable: it comes back as it is, and everything that looks at it holds.
    assert decode(encode(manifest), "again")[0] == manifest
    json.dumps(describe(manifest, seal), allow_nan=False)
    for check, other in ((check_machine, Machine([], {})), (check_rig, RigNeeds({}, 1, 1))):
        with pytest.raises(BundleError):
            check(manifest, other, "manifest.json")
    return manifest


@often
@given(data=st.data(), which=st.integers(0, 1), count=st.integers(1, 3))
def test_any_value_in_any_place(data, which, count):
    table = TABLES[which]
    for _ in range(count):
        place = data.draw(st.sampled_from(PLACES[which]))
        try:
            table = put(table, place, data.draw(VALUES))
        except (KeyError, IndexError, TypeError):  # an earlier edit took the place away
            continue
    answer(bundles.sealed(table))


@often
@given(data=st.data(), which=st.integers(0, 1))
def test_any_two_places_exchanged(data, which):
    table = TABLES[which]
    first, second = data.draw(st.sampled_from(PLACES[which])), data.draw(st.sampled_from(PLACES[which]))
    if first[: len(second)] == second or second[: len(first)] == first:
        return
    answer(bundles.sealed(put(put(table, first, at(table, second)), second, at(table, first))))


@often
@given(data=st.data(), which=st.integers(0, 1))
def test_any_entry_removed_or_doubled(data, which):
    table = json.loads(json.dumps(TABLES[which]))
    place = data.draw(st.sampled_from(PLACES[which]))
    within = at(table, place[:-1])
    if data.draw(st.booleans()):
        del within[place[-1]]
    elif isinstance(within, list):
        within.append(within[place[-1]])
    else:
        within[data.draw(WORDS)] = within[place[-1]]
    answer(bundles.sealed(table))


@often
@given(
    which=st.integers(0, 1),
    where=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    how=st.sampled_from(["set", "cut", "add"]),
)
def test_any_byte_of_the_text(which, where, byte, how):
    text = bytearray(TEXTS[which])
    where %= len(text)
    if how == "set":
        text[where] = byte
    elif how == "cut":
        del text[where : where + byte + 1]
    else:
        text[where:where] = bytes([byte])
    found = answer(bytes(text))
    assert found is None or found == ORIGINALS[which]  # white space between tokens means nothing


@often
@given(text=st.one_of(st.binary(max_size=300), VALUES.map(lambda value: json.dumps(value).encode())))
def test_any_text_at_all(text):
    assert answer(text) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_bundle_on_disk(tmp_path_factory, data):
    table = put(TABLES[0], data.draw(st.sampled_from(PLACES[0])), data.draw(VALUES))
    laid = bundles.lay(tmp_path_factory.mktemp("fuzz") / "bundle", table)
    try:
        with open_bundle(laid) as bundle:
            for name in bundle.manifest.files:
                bundle.read(name)
    except BundleError as error:
        assert str(error).startswith(str(laid))  # noqa: PT017
