"""`launcher check` finds what is planted in copies of the shipped recipes, names it, and says what to change."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.check.defects import DEFECTS, SMALL, plant
from tests.harness import launch


@pytest.fixture(scope="module")
def checks(tmp_path_factory, request):
    """What the check says of each defect that is asked for, as many at once as there are cores."""
    chosen = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        yield {name: pool.submit(check, name, tmp_path_factory.mktemp("defect")) for name in chosen}


def check(name, directory):
    defect = DEFECTS[name]
    recipe = plant(defect, directory)
    options = ("--json", "--only", defect.only, "--keep", directory / "runs")
    return launch("check", *options, recipe, *SMALL[defect.recipe])


@pytest.mark.parametrize("name", DEFECTS)
def test_it_is_found_named_and_explained(checks, name):
    defect = DEFECTS[name]
    code, output, errors = checks[name].result()
    assert code == 1, output + errors
    rows = json.loads(output)["rows"]
    [row] = [row for row in rows if row["what"] == defect.row]
    assert row["holds"] is False, rows
    assert defect.told in row["told"], row
    assert defect.advice in row["advice"], row
