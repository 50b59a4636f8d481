"""The operations guide: the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
GUIDE = TESTS.parent / "docs" / "operations.md"


def test_every_test_file_named_in_the_fault_table_exists() -> None:
    named = set(re.findall(r"`([a-z_/]+/test_[a-z_]+\.py)`", GUIDE.read_text()))
    assert len(named) > 15
    missing = {name for name in named if not (TESTS / name.removeprefix("tests/")).exists()}
    assert not missing
