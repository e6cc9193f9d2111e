"""The shipped recipes hold, in every way; and what is no mistake is not taken for one."""

import json

import pytest

from launcher.check.command import GROUPS
from tests.check.shipped import SHIPPED
from tests.harness import launch


@pytest.mark.parametrize(
    "key", [key if key.endswith("quickly") else pytest.param(key, marks=pytest.mark.slow) for key in SHIPPED]
)
def test_a_shipped_recipe_holds(checks, key):
    rows = checks[key].result()
    broken = [row for row in rows.values() if row["holds"] is False]
    assert not broken, json.dumps(broken, indent=1)
    assert {row["group"] for row in rows.values()} == set(GROUPS)
    assert rows["killed and started again"]["told"].startswith("3 kills"), rows


OWN_DATA = """
import torch, launcher

class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        for number in range(1000):
            yield torch.tensor([number % 7.0, number % 5.0])

def train(run: launcher.Run) -> None:
    model = run.build(lambda: torch.nn.Linear(2, 1))
    optimizer = run.optimizer(torch.optim.Adam(model.parameters(), lr=0.01))
    {loader}
    for step in run.steps({rows}total=20):
        for x in {batches}:
            step.backward(model(x + torch.randn_like(x)).square().sum())
        optimizer.step()
        optimizer.zero_grad()

if __name__ == "__main__":
    launcher.main(train)
"""


@pytest.mark.parametrize(
    ("loader", "rows", "batches", "why"),
    [
        ("rows = run.loader(Rows(), batch_size=8, microbatch_size=2)", "rows, ", "step", "a stream's ranks read"),
        ("", "", "step.split(torch.randn(12, 2), 4)", "each rank makes its own data"),
    ],
    ids=["a stream", "data of its own"],
)
def test_what_cannot_be_compared_is_said(tmp_path, loader, rows, batches, why):
    recipe = tmp_path / "own.py"
    recipe.write_text(OWN_DATA.format(loader=loader, rows=rows, batches=batches))
    code, output, errors = launch("check", "--json", "--only", "accumulation,ddp,elastic", recipe)
    assert code == 0, output + errors
    found = {row["what"]: row for row in json.loads(output)["rows"]}
    assert found["3 uneven micro-batches"]["holds"] is None  # its forward pass draws
    assert why in found["2 processes (DDP)"]["told"]
    assert found["2 processes, then 1"]["holds"] is None
