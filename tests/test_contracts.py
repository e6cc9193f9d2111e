"""The contracts at their edges: a body that skips its data, values logged late, draws, shorter and longer data."""

import functools
import math
import random
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import launcher
from launcher.batches import check_batch
from tests.harness import losses, metrics, status, tensors
from tests.test_run import data, learn, parts

if TYPE_CHECKING:
    from launcher import Run


@dataclass(frozen=True)
class Config:
    steps: int = 4
    epochs: int = 1
    batch_size: int = 8


def numbered(size):
    """Samples that carry their own number."""
    return torch.arange(size, dtype=torch.float32)[:, None], torch.zeros(size, 1)


class Numbers(torch.utils.data.IterableDataset):
    """The same numbers as a stream."""

    def __iter__(self):
        yield from zip(*numbered(100), strict=True)


def tiny(run):
    """A model of numbered samples whose weights stay near where they were."""
    model = run.build(lambda: nn.Linear(1, 1))
    return model, run.optimizer(torch.optim.SGD(model.parameters(), lr=1e-6))


# The data


def test_a_stream_that_does_not_divide_is_refused_with_sizes_that_do(run_recipe):
    def train(run: launcher.Run) -> None:
        loader = run.loader(Numbers(), batch_size=10, microbatch_size=4)
        list(run.steps(loader, total=1))

    said = run_recipe(train, code=2)
    assert "Traceback" not in said
    fixes = re.findall(r"(microbatch_size|batch_size) (\d+)", said.rpartition("take ")[2])
    assert fixes, said
    for name, size in fixes:
        check_batch(**{"batch_size": 10, "microbatch_size": 4, name: int(size)}, world_size=1, stream=True)


def skipping(kind, how, seen):
    """A recipe whose step 1 takes none of its two micro-batches, or one."""

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer = tiny(run)
        count = (lambda batch: len(batch[0])) if kind == "counted" else None
        source = Numbers() if kind == "stream" else numbered(100)
        loader = run.loader(source, batch_size=8, microbatch_size=4, shuffle=False, count=count)
        for step in run.steps(loader, total=cfg.steps):
            if step.index == 1 and how == "all":
                continue
            for x, y in step:
                seen.append((step.index, x[:, 0].tolist()))
                step.backward(F.mse_loss(model(x), y, reduction="sum"))
                if step.index == 1:
                    break
            else:
                optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.mark.parametrize("kind", ["dataset", "counted", "stream"])
@pytest.mark.parametrize("how", ["all", "half"])
@pytest.mark.parametrize("first", [2, 3])
def test_skipped_micro_batches_are_consumed(run_recipe, kind, how, first):
    seen = []
    train = skipping(kind, how, seen)
    run_recipe(train, "--steps", first)
    run_recipe(train, "--steps", 5)
    skipped = {(1, 0), (1, 1)} if how == "all" else {(1, 1)}
    places = [(step, k) for step in range(5) for k in range(2) if (step, k) not in skipped]
    assert seen == [(step, [float(8 * step + 4 * k + i) for i in range(4)]) for step, k in places]


def epochs(seen, size):
    """A recipe that reads its epochs, and breaks off after `--steps`."""

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer = tiny(run)
        loader = run.loader(numbered(size), batch_size=cfg.batch_size, microbatch_size=1)
        for step in run.steps(loader, epochs=cfg.epochs):
            for x, y in step:
                seen.append((step.index, int(x)))
                step.backward(F.mse_loss(model(x), y, reduction="sum"))
            optimizer.step()
            optimizer.zero_grad()
            if step.index + 1 == cfg.steps:
                break

    return train


def test_a_second_epoch_follows_a_finished_first(run_recipe):
    seen = []
    train = epochs(seen, 5)
    run_recipe(train, "--batch-size", 4, "--steps", 100)
    assert sorted(sample for _, sample in seen) == [0, 1, 2, 3, 4]
    run_recipe(train, "--batch-size", 4, "--steps", 100, "--epochs", 2)
    assert sorted(sample for _, sample in seen) == sorted([0, 1, 2, 3, 4] * 2)
    assert sorted({step for step, _ in seen}) == list(range(status(run_recipe.dir)["global_step"]))


def test_another_batch_size_ends_where_the_data_does(run_recipe):
    seen = []
    train = epochs(seen, 20)
    run_recipe(train, "--epochs", 2, "--steps", 2)
    changed = ("--epochs", 2, "--steps", 100, "--batch-size", 5)
    assert "--run.allow batch_size" in run_recipe(train, *changed, code=2)
    run_recipe(train, *changed, "--run.allow", "batch_size")
    assert sorted(sample for _, sample in seen) == sorted([*range(20)] * 2)
    assert status(run_recipe.dir)["global_step"] == 2 + 5, "16 samples by 8 and 24 by 5"


def test_data_of_another_length_needs_leave(run_recipe):
    seen = []

    def of_size(size):
        def train(run: launcher.Run, cfg: Config) -> None:
            model, optimizer = tiny(run)
            loader = run.loader(numbered(size), batch_size=4)
            for step in run.steps(loader, total=cfg.steps):
                learn(model, optimizer, step)
                seen.append(step.index)

        return train

    run_recipe(of_size(20), "--steps", 2)
    said = run_recipe(of_size(24), "--steps", 4, code=2)
    assert "--run.allow data" in said
    assert "20" in said
    assert "24" in said
    assert "Traceback" not in said
    run_recipe(of_size(24), "--steps", 4, "--run.allow", "data")
    assert seen == [0, 1, 2, 3]


def test_a_step_broken_off_before_its_update_is_read_again(run_recipe):
    seen, leave = [], [2]

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer = tiny(run)
        loader = run.loader(Numbers(), batch_size=4, microbatch_size=2)
        for step in run.steps(loader, total=cfg.steps):
            for x, y in step:
                seen.append((step.index, x[:, 0].tolist()))
                step.backward(F.mse_loss(model(x), y, reduction="sum"))
            if step.index in leave:
                break
            optimizer.step()
            optimizer.zero_grad()

    run_recipe(train)
    assert status(run_recipe.dir)["global_step"] == 2
    broken_off = seen[4:]
    leave.clear()
    run_recipe(train)
    assert seen[4:6] == seen[6:8] == broken_off == [(2, [8.0, 9.0]), (2, [10.0, 11.0])]
    assert [number for _, numbers in seen[6:] for number in numbers] == [float(i) for i in range(8, 16)]


def test_loaders_made_in_another_order_are_one_line(run_recipe):
    def with_one_before(before):
        def train(run: launcher.Run, cfg: Config) -> None:
            if before:
                run.loader(data(4), batch_size=2)
            model, optimizer, loader = parts(run)
            for step in run.steps(loader, total=cfg.steps):
                learn(model, optimizer, step)

        return train

    run_recipe(with_one_before(False), "--steps", 2)
    said = run_recipe(with_one_before(True), "--steps", 4, code=2)
    assert "loader_1" in said
    assert "Traceback" not in said


# What is logged


def test_an_evaluation_behind_the_update_is_on_its_line(run_recipe, tmp_path):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)
            if step.every(2):
                half = run.average(lambda batch: {"half": (len(batch[0]), 2 * len(batch[0]))}, loader)["half"]
                step.log(val=step.index + half)

    run_recipe(train, "--steps", 6, "--run.log-every", 1000)
    run_recipe(train, "--steps", 6, "--run.log-every", 1, "--run.dir", tmp_path / "every")
    lines = metrics(run_recipe.dir)
    assert {step: line.get("val") for step, line in lines.items()} == {1: 0.5, 3: 2.5, 5: 4.5, 6: None}
    every = losses(tmp_path / "every")
    assert losses(run_recipe.dir) == {step: every[step] for step in (1, 3, 5, 6)}


def test_run_log_follows_the_update(run_recipe):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            run.log(before=step.index)
            learn(model, optimizer, step)
            run.log(after=step.index)

    run_recipe(train, "--steps", 3)
    lines = metrics(run_recipe.dir)
    assert {step: line.get("before") for step, line in lines.items()} == {0: 0, 1: 1, 2: 2, 3: None}
    assert {step: line.get("after") for step, line in lines.items()} == {0: None, 1: 0, 2: 1, 3: 2}


def test_a_logged_parameter_is_as_it_was_when_logged(run_recipe):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.scale * x

    seen = []

    def train(run: launcher.Run, cfg: Config) -> None:
        model = run.build(Scale)
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = run.loader((torch.ones(8, 1),), batch_size=2)
        for step in run.steps(loader, total=cfg.steps):
            seen.append(model.scale.item())
            step.log(first=model.scale)
            for (x,) in step:
                step.backward(model(x).sum())
            step.log(second=model.scale, gradient=model.scale.grad)
            optimizer.step()
            model.scale.grad.zero_()

    run_recipe(train, "--run.log-every", 1)
    assert len(set(seen)) == 4
    lines = metrics(run_recipe.dir)
    assert [lines[step]["second"] for step in range(1, 5)] == pytest.approx(seen)
    assert [lines[step]["first"] for step in range(1, 4)] == pytest.approx(seen[1:])
    assert [lines[step]["gradient"] for step in range(1, 5)] == [1.0] * 4


def test_a_numpy_number_is_logged(run_recipe):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)
            step.log(v=np.float32(1.5), n=np.int64(2))
        run.log(last=np.float64(2.5))

    run_recipe(train, "--run.log-every", 1)
    lines = metrics(run_recipe.dir)
    assert [(lines[step]["v"], lines[step]["n"]) for step in range(1, 5)] == [(1.5, 2)] * 4
    assert lines[4]["last"] == 2.5


@pytest.mark.parametrize("value", [torch.ones(2), "text"])
@pytest.mark.parametrize("where", ["run", "step"])
def test_what_is_no_number_is_not_logged(run_recipe, value, where):
    def train(run: launcher.Run) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=2):
            learn(model, optimizer, step)
            (run if where == "run" else step).log(curve=value)

    said = run_recipe(train, code=1)
    assert "curve" in said
    assert "Traceback" not in said


def test_a_mean_of_nothing_is_nan(run_recipe):
    result = {}

    def train(run: launcher.Run) -> None:
        loader = run.loader(data(), batch_size=8)
        result.update(run.average(lambda batch: {"none": (torch.tensor(1.0), 0), "some": (2.0, 1)}, loader))

    run_recipe(train)
    assert math.isnan(result["none"])
    assert result["some"] == 2.0


# Draws


def draw():
    """One number from each of the host's generators."""
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def drawing(drawn, attempts):
    """A recipe that draws wherever it may outside of its micro-batches."""

    def train(run: launcher.Run, cfg: Config) -> None:
        attempts.append(drawn_here := {})
        drawn_here["train"] = draw()

        def make():
            linear = nn.Linear(3, 1)
            with torch.no_grad():
                linear.bias.copy_(torch.from_numpy(np.random.rand(1)))
            drawn_here["make"] = draw()
            return linear

        model = run.build(make)
        drawn_here["built"] = draw()
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = run.loader(data(), batch_size=8, microbatch_size=4)

        def score(batch):
            return {name: (number, 1) for name, number in zip("abc", draw(), strict=True)}

        for step in run.steps(loader, total=cfg.steps):
            drawn[step.index] = draw()
            if step.index == 1:
                drawn_here["score"] = tuple(run.average(score, loader).values())
            learn(model, optimizer, step)

    return train


def test_draws_outside_of_micro_batches_repeat(run_recipe, tmp_path):
    bodies, attempts = [{}, {}], []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        run_recipe(drawing(bodies[seed], attempts), "--run.dir", tmp_path / f"run{seed}")
    assert attempts[0] == attempts[1]
    assert bodies[0] == bodies[1]
    drawn = [*attempts[0].values(), *bodies[0].values()]
    assert len({numbers[0] for numbers in drawn}) == len(drawn), "each place has its own draws"
    assert tensors(tmp_path / "run0")["model/bias"] == tensors(tmp_path / "run1")["model/bias"]


def test_a_resumed_body_draws_what_a_straight_one_does(run_recipe, tmp_path):
    straight, resumed = {}, {}
    run_recipe(drawing(straight, []), "--steps", 4, "--run.dir", tmp_path / "straight")
    run_recipe(drawing(resumed, []), "--steps", 2)
    torch.manual_seed(5)
    run_recipe(drawing(resumed, []), "--steps", 4)
    assert resumed == straight


# What is saved


def test_a_multi_step_schedule_goes_on(run_recipe, tmp_path):
    rates = []

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer.inner, milestones=[2, 5, 6], gamma=0.5)
        run.track(scheduler, "scheduler")
        for step in run.steps(loader, total=cfg.steps):
            rates.append(optimizer.param_groups[0]["lr"])
            learn(model, optimizer, step)
            scheduler.step()

    run_recipe(train, "--steps", 8, "--run.dir", tmp_path / "straight")
    straight, rates = rates, []
    run_recipe(train, "--steps", 3)
    run_recipe(train, "--steps", 8)
    assert rates == straight
    assert len(set(rates)) == 4


def test_a_tracked_state_comes_back_as_it_was(run_recipe):
    state = {
        "keys": {1: "one", 2: {"three": (3, 4.0, None)}, "4": "text"},
        "pairs": {(0, 1): [True, (torch.arange(3), "a")]},
        "empty": ((), {}, []),
        "$tuple": [1],
    }
    loaded = []

    class Box:
        def state_dict(self):
            return state

        def load_state_dict(self, given):
            loaded.append(given)

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        run.track(Box(), "box")
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)

    run_recipe(train, "--steps", 1)
    run_recipe(train, "--steps", 2)
    [given] = loaded
    tensor = given["pairs"][0, 1][1][0]
    assert torch.equal(tensor, torch.arange(3))
    assert {**given, "pairs": None} == {**state, "pairs": None}
    assert given["pairs"] == {(0, 1): [True, (tensor, "a")]}


def test_an_object_that_is_no_longer_tracked_is_one_line(run_recipe):
    class Counter:
        def state_dict(self):
            return {"n": 0}

        def load_state_dict(self, state):
            pass

    def with_counter(tracked):
        def train(run: launcher.Run, cfg: Config) -> None:
            model, optimizer, loader = parts(run)
            if tracked:
                run.track(Counter(), "counter", per_rank=True)
            for step in run.steps(loader, total=cfg.steps):
                learn(model, optimizer, step)

        return train

    run_recipe(with_counter(True), "--steps", 1)
    said = run_recipe(with_counter(False), "--steps", 2, code=1)
    assert "'counter'" in said
    assert "Traceback" not in said


def test_a_restart_needs_no_initial_weights(run_recipe, tmp_path):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)

    base = tmp_path / "base"
    run_recipe(train, "--steps", 1, "--run.dir", base)
    run_recipe(train, "--steps", 2, "--run.init-from", base)
    base.rename(tmp_path / "gone")
    run_recipe(train, "--steps", 3, "--run.init-from", base)
    assert status(run_recipe.dir)["global_step"] == 3
    fresh = tmp_path / "fresh"
    assert str(base) in run_recipe(train, "--steps", 3, "--run.init-from", base, "--run.dir", fresh, code=2)


def test_averaged_weights_are_swapped_in_and_out_when_sharded(run_recipe, tmp_path):
    outputs = {}

    def train(run: launcher.Run, cfg: Config) -> None:
        torch.manual_seed(0)
        x = torch.randn(2, 3)
        model = run.build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = run.loader(data(), batch_size=8, microbatch_size=4)
        ema = launcher.EMA(run, model, decay=0.5)

        def forward():
            with torch.no_grad():
                return model(x).clone()

        def mean():
            return run.average(lambda batch: {"y": (model(batch[0]).sum(), len(batch[0]))}, loader)["y"]

        seen = outputs.setdefault(run.config.shard, [])
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)
            ema.update()
            plain = mean(), forward()
            with ema.swapped():
                averaged = forward(), mean(), forward()
            after = forward()
            seen.append((plain[1], averaged[0], torch.tensor([plain[0], averaged[1]])))
            assert torch.equal(averaged[0], averaged[2])
            assert torch.equal(plain[1], after)
            assert not torch.equal(plain[1], averaged[0])

    for shard in ("none", "full"):
        run_recipe(train, "--run.shard", shard, "--run.dir", tmp_path / shard)
    torch.testing.assert_close(outputs["full"], outputs["none"])


# How a run starts and ends


@pytest.mark.parametrize("given", ["bad data", 0, None])
def test_a_recipe_that_exits_has_failed(run_recipe, given):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)
            if step.index == 1:
                sys.exit(given)

    said = run_recipe(train, code=1)
    assert "Traceback" not in said
    assert given is None or str(given) in said
    assert status(run_recipe.dir)["status"] == "failed"


def test_a_partial_is_a_recipe(run_recipe):
    called = []

    def train(width: int, run: launcher.Run, cfg: Config) -> None:
        called.append((width, cfg.steps))

    def bare(width: int, run: launcher.Run) -> None:
        called.append((width, run.seed))

    run_recipe(functools.partial(train, 3), "--steps", 7)
    run_recipe(functools.partial(bare, 4), "--run.seed", 5, "--run.dir", run_recipe.dir.with_name("bare"))
    assert called == [(3, 7), (4, 5)]


def test_annotations_may_be_for_the_type_checker_alone(run_recipe):
    called = []

    def train(run: "Run", cfg: "Config") -> None:
        called.append(cfg.steps)

    run_recipe(train, "--steps", 6)
    assert called == [6]


def test_an_optimizer_that_needs_a_closure_is_refused(run_recipe):
    def train(run: launcher.Run) -> None:
        model = run.build(lambda: nn.Linear(3, 1))
        run.optimizer(torch.optim.LBFGS(model.parameters()))

    said = run_recipe(train, code=1)
    assert "LBFGS" in said
    assert "Traceback" not in said
