"""One cluster for all these tests; every test finds it idle."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, default_track, why_not


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("slurm")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and (lab := getattr(item, "funcargs", {}).get("lab")):
        report.sections.append(("SLURM's logs", lab.logs()))
    return report


@pytest.fixture(scope="session")
def lab():
    """The cluster; the environment may say SLURM_TRACK=cgroup or linuxproc, and SLURM_ACCOUNTING=1."""
    if reason := why_not():
        pytest.skip(reason)
    track = os.environ.get("SLURM_TRACK") or default_track()
    accounting = os.environ.get("SLURM_ACCOUNTING", "") not in ("", "0")
    cluster = Lab(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"), track, accounting)  # a short path: sockets lie in it
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(autouse=True)
def idle(request):
    """Clear away what a test leaves behind; a test that asks for no cluster starts none."""
    if "lab" not in request.fixturenames:
        yield
        return
    lab = request.getfixturevalue("lab")
    yield
    lab.reset()
