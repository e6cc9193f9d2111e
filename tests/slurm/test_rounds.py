"""What happens to jobs on a real cluster: one round a kind. The long campaign is in test_campaign.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import tensors
from tests.slurm.rounds import LONG, STEPS, Round, left_behind, straight

TOGETHER = (
    *("time limit", "scontrol requeue", "scontrol requeue before the first step", "SIGKILL of a rank"),
    *("hardware error", "scancel", "code error", "finished"),
)
ALONE = ("preemption with grace", "node crash")
HARMLESS = ("slurmctld restart", "drain")


def play(lab, path, names):
    """Rounds that do not disturb each other, at once: most of a round is waiting."""
    with ThreadPoolExecutor(len(names)) as pool:
        rounds = list(pool.map(lambda name: Round(lab, path / name.replace(" ", "-"), name).play(), names))
    assert not left_behind(lab)
    return rounds


@pytest.mark.timeout(400)
def test_each_goes_on_or_ends_as_it_should(lab, tmp_path, start):
    rounds = play(lab, tmp_path, TOGETHER)
    expected = {steps: straight(start, tmp_path / f"straight-{steps}", steps) for steps in (STEPS, LONG)}
    for one in rounds:
        if one.kind.loses is not None:
            one.compare(expected[one.kind.steps])
    assert tensors(rounds[TOGETHER.index("scancel")].path)  # it has saved before it left


BY_HAND = (("preemption",), ("preemption that cancels",), HARMLESS)  # the campaign plays them too
SLOW = [pytest.param(names, marks=pytest.mark.slow) for names in BY_HAND]


@pytest.mark.parametrize("names", [*((name,) for name in ALONE), *SLOW], ids=lambda names: " and ".join(names))
def test_goes_on_from_its_last_agreed_step(lab, tmp_path, start, names):
    rounds = play(lab, tmp_path, names)
    expected = straight(start, tmp_path / "straight")
    for one in rounds:
        one.compare(expected)
