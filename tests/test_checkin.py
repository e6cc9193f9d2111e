"""Which ranks did not come to the start, and where they should be."""

import pytest
from torch.distributed import HashStore

from launcher.checkin import CheckIn, missing_line
from launcher.errors import UsageError


@pytest.mark.parametrize(
    ("came", "nodes", "said"),
    [
        ({0: "a", 1: "a", 2: "b"}, [], "1 of 4 ranks has not come in 9 s: rank 3 on b; look at what they printed"),
        ({0: "a", 1: "a"}, [], "2 of 4 ranks have not come in 9 s: ranks 2-3; look"),
        ({0: "a", 1: "a"}, ["a", "b"], "2 of 4 ranks have not come in 9 s: ranks 2-3 on b; look"),
        ({1: "a"}, ["a", "b"], "3 of 4 ranks have not come in 9 s: rank 0 on a, ranks 2-3 on b; look"),
    ],
)
def test_names_ranks_and_their_hosts(came, nodes, said):
    line = missing_line(came, 4, 2, nodes, 9.0, "a:29500")
    assert line.startswith(said)
    assert "whether they reach a:29500 (--run.join-within SECONDS waits longer)" in line


def test_a_node_with_gaps_and_many_nodes():
    assert "rank 1 on a, rank 3 on a" not in missing_line({0: "a", 2: "a"}, 4, 4, [], 9.0, "a:1")
    assert "ranks 1, 3 on a" in missing_line({0: "a", 2: "a"}, 4, 4, [], 9.0, "a:1")
    line = missing_line({0: "n0"}, 40, 2, [f"n{k}" for k in range(20)], 9.0, "n0:1")
    assert "rank 1 on n0, ranks 2-3 on n1" in line
    assert line.count(" on n") == 8
    assert "all or some of 12 nodes more" in line


def test_an_environment_without_a_place_to_meet():
    with pytest.raises(UsageError, match="does not say where the ranks meet"):
        CheckIn(0, 2, 2, {"MASTER_PORT": "29500"})


def test_what_gloo_says_of_a_rank():
    check_in = CheckIn(0, 2, 1, {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    check_in.hosts = ("a", "b")
    assert "cannot connect to rank 1 on b: it has ended" in check_in.unreached("wait timeout, keys: /0//cpu//0/1\nmore")
    assert "cannot connect to all other ranks: one has ended" in check_in.unreached("Connect timeout [none]")
    assert check_in.unreached("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 9 ms").count("rank 1 on b") == 1


class Leaving:
    """A store that rank 0 has given the outcome, and takes with it as soon as a rank says that it has read that."""

    def __init__(self):
        self.kept, self.looks, self.gone = HashStore(), 0, False
        self.kept.set("outcome", "0")
        self.kept.add("came", 2)

    def check(self, keys):
        self.looks += 1
        return False if self.looks == 1 else self.kept.check(keys)

    def compare_set(self, key, _, __):
        return self.kept.get(key)

    def get(self, key):
        assert not self.gone, "the store has gone"
        return self.kept.get(key)

    def add(self, key, number):
        assert not (self.gone and number), "it says so once"
        self.gone = self.gone or (key, number) == ("read", 1)
        return self.kept.add(key, number)


def test_a_rank_says_that_it_has_read_the_outcome_once_it_has():
    """Two ranks give up in the same moment: the second finds the first one's word in place of its own."""
    store = Leaving()
    check_in = CheckIn(1, 3, 3, {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert check_in._outcome(store, 0.0) == "0"
    assert store.kept.add("read", 0) == 1
