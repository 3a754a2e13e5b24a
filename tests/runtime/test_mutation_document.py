"""tests/mutation.md speaks of lines that are there, and of a run on the limiter as it is."""

import hashlib
import json
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "runtime" / "limits.py"

pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="the tests run outside a checkout")


def test_every_line_that_it_quotes_is_a_line_of_the_limiter():
    lines = {line.strip().partition("  #")[0] for line in SOURCE.read_text().splitlines()}
    rows = [row for row in (TESTS / "mutation.md").read_text().splitlines() if row.startswith("| `")]
    quoted = [code for row in rows for code in re.findall(r"`([^`]+)`", row.partition(" | ")[0].replace(r"\|", "|"))]
    assert len(quoted) > 50
    assert [code for code in quoted if code not in lines] == []


def test_its_verdicts_are_of_this_limiter():
    head, *_ = (TESTS / "mutation.jsonl").read_text().splitlines()
    assert json.loads(head)["limits"] == hashlib.sha256(SOURCE.read_bytes()).hexdigest(), (
        "the limiter changed: python tests/mutate_limits.py --state tests/mutation.jsonl"
    )
