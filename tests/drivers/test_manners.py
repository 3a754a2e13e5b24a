"""docs/SAFETY.md says what the drivers say of themselves."""

import pytest
from support.manners_table import BEGIN, DOCUMENT, END, with_manners

pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="the tests run outside a checkout")


def test_the_table_of_stop_actions_is_the_drivers():
    text = DOCUMENT.read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert text == with_manners(text), "out of date: cd tests && python -m support.manners_table"
