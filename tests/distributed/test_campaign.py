"""Killed at random moments again and again, a run loses nothing but what it was about to write."""

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.distributed.campaign import SETTINGS, Campaign
from tests.forked import jobs

SEED = int(os.environ.get("CAMPAIGN_SEED", secrets.randbelow(10**6)))


@pytest.mark.parametrize("setting", ["1", "2-fsdp"])
def test_a_few_kills(tmp_path, setting):
    """A short form of the campaign below, other moments each time."""
    campaign(tmp_path, setting, kills=3, steps=60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills(tmp_path):
    """`pytest -m slow tests/distributed/test_campaign.py`; CAMPAIGN_OUT=FILE keeps what it has seen."""
    tallies = []
    for setting, kills in zip(SETTINGS, (67, 67, 66), strict=True):
        (tmp_path / setting).mkdir()
        tallies.append(campaign(tmp_path / setting, setting, kills=kills, steps=300))
    if out := os.environ.get("CAMPAIGN_OUT"):
        Path(out).write_text(json.dumps([asdict(tally) for tally in tallies], indent=2) + "\n")


def campaign(path, setting, *, kills, steps):
    print(f"CAMPAIGN_SEED={SEED} tries the same moments")
    with jobs(path) as start:
        tally = Campaign(start, path, setting, steps=steps, seed=SEED).run(kills)
    print(tally)
    assert tally.counted == kills
    return tally
