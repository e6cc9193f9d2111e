"""Checks in this process, several at once, with one server of processes for all of them."""

import ast
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from launcher.check.command import check, chosen
from tests.check.defects import DEFECTS, SMALL, plant
from tests.check.shipped import SHIPPED
from tests.forked import serve
from tests.harness import ROOT


@pytest.fixture(scope="module")
def one_parses():
    """Python 3.11 cannot parse in two threads: each finds the other's depth in the tree (cpython issue 106905)."""
    parse, lock = ast.parse, threading.Lock()

    def in_turn(*arguments, **named):
        with lock:
            return parse(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "parse", in_turn)
        yield


@pytest.fixture(scope="module")
def checks(tmp_path_factory, request, one_parses):
    """The rows of every check that a test of this file asks for, by its key: futures, begun in their order."""
    serve()
    mine = [item for item in request.session.items if item.path == request.path and "checks" in item.fixturenames]
    keys = [item.callspec.params["key"] for item in mine]
    rooms = {key: tmp_path_factory.mktemp("check") for key in keys}
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        futures = {key: pool.submit(rows_of, key, rooms[key]) for key in keys}
        yield futures
        for future in futures.values():
            future.cancel()


def rows_of(key, room):
    if key in DEFECTS:
        defect = DEFECTS[key]
        recipe, only, options = plant(defect, room), defect.only, SMALL[defect.recipe]
    else:
        name, only = SHIPPED[key]
        recipe, options = ROOT / "recipes" / f"{name}.py", SMALL[name]
    groups, ways = chosen(only)
    runs = room / "runs"
    runs.mkdir()
    found = check(str(recipe), options, runs, groups, ways, cuda=False, world_size=2, seed=0)
    return {one.what: json.loads(json.dumps(asdict(one))) for one in found}
