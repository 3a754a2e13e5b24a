"""docs/rigs.md says what the code does."""

import re

import pytest
from support.rig_table import BEGIN, DOCUMENT, END, PLACES, with_table

from chatvla_edge.drivers import registry, rig

pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="the tests run outside a checkout")


def test_the_fields_are_the_model_s():
    assert set(PLACES) == set(rig.PARTS)
    text = DOCUMENT.read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert text == with_table(text), "out of date: cd tests && python -m support.rig_table"


@pytest.mark.parametrize("part", rig.PARTS)
def test_every_field_is_explained(part):
    assert [name for name, field in part.model_fields.items() if not field.description] == []


def test_every_rig_that_comes_along_is_listed():
    text = DOCUMENT.read_text()
    assert [name for name in rig.names() if f"`{name}`" not in text] == []


def test_what_it_shows_of_a_rig_is_a_rig():
    shown = re.search(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL).group(1)
    assert rig.parse(shown, "docs/rigs.md").name == "my_rig"


def test_every_simulated_driver_is_listed():
    text = DOCUMENT.read_text()
    ours = {name for role in registry.ROLES for name, place in registry.OURS[role].items() if place.startswith("sim.")}
    assert [name for name in sorted(ours) if f"`{name}`" not in text] == []
