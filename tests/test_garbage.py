"""The collector: frozen after the first steps, run at set steps, and as it was once the steps are over."""

import gc
import weakref

import pytest

from launcher.garbage import Garbage


class Cycle:
    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


def test_it_collects_at_set_steps_alone():
    garbage = Garbage(every=3, empty_cache_every=0)
    garbage.edge(10)
    assert gc.isenabled(), "the first step of a start makes much that stays"
    garbage.edge(11)
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 0
    lost = weakref.ref(Cycle())
    garbage.edge(13)
    assert lost() is not None
    garbage.edge(15)
    assert lost() is None
    with garbage.automatic():
        assert gc.isenabled()
    assert not gc.isenabled()
    garbage.release()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_pythons_own_is_left_alone():
    garbage = Garbage(every=0, empty_cache_every=0)
    for step in range(5):
        garbage.edge(step)
    with garbage.automatic():
        assert gc.isenabled()
    garbage.release()
    assert gc.isenabled()


def test_a_recipe_that_has_switched_it_off_keeps_it_off():
    gc.disable()
    garbage = Garbage(every=1, empty_cache_every=0)
    for step in range(5):
        garbage.edge(step)
    with garbage.automatic():
        assert not gc.isenabled()
    assert gc.get_freeze_count() == 0
    garbage.release()
    assert not gc.isenabled()


def test_a_recipe_that_switches_it_on_within_a_step_has_it_back():
    garbage = Garbage(every=100, empty_cache_every=0)
    garbage.edge(1)
    garbage.edge(2)
    gc.enable()
    with garbage.automatic():
        assert gc.isenabled()
    assert gc.isenabled()
    garbage.edge(3)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_a_recipe_has_frozen_stays_frozen():
    gc.freeze()
    garbage = Garbage(every=1, empty_cache_every=0)
    for step in range(5):
        garbage.edge(step)
    assert not gc.isenabled()
    garbage.release()
    assert gc.get_freeze_count() > 0
    assert gc.isenabled()
