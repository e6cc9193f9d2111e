"""Values gathered over ranks carry the gradient that one process would have."""

from pathlib import Path

import pytest


@pytest.mark.parametrize("world_size", [1, 3])
def test_gathered_rows_carry_gradients(start, tmp_path, world_size):
    start(world_size, Path(__file__).parent / "collect.py", "--run.dir", tmp_path / "run").ok()
