"""`launcher check` finds what is planted in copies of the shipped recipes, names it, and says what to change."""

import pytest

from tests.check.defects import DEFECTS


@pytest.mark.parametrize("key", DEFECTS)
def test_it_is_found_named_and_explained(checks, key):
    defect = DEFECTS[key]
    rows = checks[key].result()
    row = rows[defect.row]
    assert row["holds"] is False, rows
    assert defect.told in row["told"], row
    assert defect.advice in row["advice"], row
