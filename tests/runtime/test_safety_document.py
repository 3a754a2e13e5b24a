"""docs/SAFETY.md says what the code does."""

import pytest
from support.safety_table import BEGIN, DOCUMENT, END, with_table

from chatvla_edge.runtime.conditions import LONGEST_STOP_NS, SETTLE_NS
from chatvla_edge.runtime.modes import LEASE_NS, MS, S

pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="the tests run outside a checkout")


def test_the_table_of_conditions_is_the_codes():
    text = DOCUMENT.read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert text == with_table(text), "out of date: cd tests && python -m support.safety_table"


@pytest.mark.parametrize(
    "sentence",
    [
        f"lease of {LEASE_NS // MS} ms",
        f"longest stop, {LONGEST_STOP_NS // S} s",
        f"{SETTLE_NS // MS} ms later",
    ],
)
def test_the_numbers_in_its_sentences_are_the_codes(sentence):
    assert sentence in DOCUMENT.read_text()
