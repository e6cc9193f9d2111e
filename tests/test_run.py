"""The recipe's handle, in one process: what it promises, and what it refuses by name."""

import os
import random
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import launcher
from tests.harness import assert_same, losses, metrics, status, tensors


@dataclass(frozen=True)
class Config:
    steps: int = 4
    lr: float = 0.1


def data(size=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, generator=generator), torch.randn(size, 1, generator=generator)


def parts(run, **loader):
    """A linear model, its optimizer and its data."""
    model = run.build(lambda: nn.Linear(3, 1))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    return model, optimizer, run.loader(data(), **{"batch_size": 8, "microbatch_size": 4, **loader})


def learn(model, optimizer, step):
    for x, y in step:
        step.backward(F.mse_loss(model(x), y, reduction="sum"))
    optimizer.step()
    optimizer.zero_grad()


def test_lines_follow_the_steps(run_recipe):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            if step.every(2):
                step.log(before=float(step.index))
            learn(model, optimizer, step)
            step.log(after=torch.tensor(float(step.index)))
        run.log(final=1.0)

    run_recipe(train, "--steps", 5, "--run.log-every", 3)
    lines = metrics(run_recipe.dir)
    assert sorted(lines) == [0, 1, 2, 3, 4, 5], "first, last, every third, and where step.every was true"
    assert {step: line.get("before") for step, line in lines.items()} == {0: 0, 1: None, 2: 2, 3: None, 4: 4, 5: None}
    assert {step: line.get("after") for step, line in lines.items()} == {0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
    assert lines[5]["final"] == 1.0
    assert sorted(losses(run_recipe.dir)) == [1, 2, 3, 4, 5]


def test_what_a_later_start_adds_to_a_line_leaves_the_rest(run_recipe):
    """Of one step the latest attempt counts, and a start that finds all steps made still tells what it scores."""

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)
        run.log(final=1.0)

    run_recipe(train)
    before = losses(run_recipe.dir)
    run_recipe(train)
    line = metrics(run_recipe.dir)[4]
    assert (line["attempt"], line["final"]) == (2, 1.0)
    assert losses(run_recipe.dir) == before


def test_a_save_before_an_evaluation_takes_nothing_from_its_line(run_recipe, tmp_path):
    """The evaluation alone makes the line due: a save has read the loss before, and a later start finds it there."""
    failing = True

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            if failing and step.index == 4:
                raise RuntimeError
            if step.every(2):
                step.log(score=1.0)
            learn(model, optimizer, step)

    options = ["--steps", 6, "--run.log-every", 100, "--run.dir"]
    with pytest.raises(RuntimeError):
        run_recipe(train, "--run.save-every", 4, *options, tmp_path / "fails")
    failing = False
    run_recipe(train, "--run.save-every", 4, *options, tmp_path / "fails")
    run_recipe(train, "--run.save-every", 4, *options, tmp_path / "saves")
    run_recipe(train, *options, tmp_path / "plain")
    assert sorted(losses(tmp_path / "plain")) == [1, 2, 4, 6]
    assert losses(tmp_path / "fails") == losses(tmp_path / "saves") == losses(tmp_path / "plain")
    assert metrics(tmp_path / "fails")[4]["attempt"] == 2


def test_a_save_takes_nothing_from_what_is_logged_before_the_micro_batches(run_recipe, tmp_path):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            step.log(rate=float(step.index))
            learn(model, optimizer, step)

    options = ["--steps", 7, "--run.log-every", 2, "--run.dir"]
    run_recipe(train, *options, tmp_path / "plain")
    run_recipe(train, "--run.save-every", 4, *options, tmp_path / "saves")
    rates = [{step: line.get("rate") for step, line in metrics(tmp_path / name).items()} for name in ("plain", "saves")]
    assert rates[0] == rates[1] == {1: 1, 2: 2, 4: 4, 6: 6, 7: None}


def test_a_value_that_no_line_took_is_told(run_recipe):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)
            if step.index == 1:
                step.log(lost=1.0)

    assert "lost" in run_recipe(train)


def test_epochs_end_in_a_short_batch(run_recipe):
    seen = []

    def train(run: launcher.Run) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, epochs=2):
            seen.append(step.count)
            learn(model, optimizer, step)

    run_recipe(train)
    assert seen == [8, 8, 8, 8, 8]
    assert sum(seen) == 2 * 20


def test_a_frozen_model_is_neither_trained_nor_saved(run_recipe):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        teacher = run.build(lambda: nn.Linear(3, 1), frozen=True)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        for step in run.steps(loader, total=cfg.steps):
            for x, _ in step:
                step.backward(F.mse_loss(model(x), teacher(x), reduction="sum"))
            optimizer.step()
            optimizer.zero_grad()

    run_recipe(train)
    assert set(tensors(run_recipe.dir)) == {"model/weight", "model/bias"}


def test_weights_do_not_depend_on_what_was_drawn_before(run_recipe):
    built = []

    def train(run: launcher.Run) -> None:
        torch.rand(len(built) + 1)
        built.append(run.build(lambda: nn.Linear(3, 1)).weight.detach().clone())

    run_recipe(train)
    run_recipe(train)
    assert torch.equal(*built)


def test_a_broken_off_loop_is_saved_where_it_stands(run_recipe):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=10):
            learn(model, optimizer, step)
            if step.index == 2:
                break

    run_recipe(train)
    assert status(run_recipe.dir)["status"] == "finished"
    assert status(run_recipe.dir)["global_step"] == 3


def test_finish_ends_the_loop_and_not_the_recipe(run_recipe):
    after = []

    def train(run: launcher.Run) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=10):
            if step.index == 2:
                run.finish("good enough")
            learn(model, optimizer, step)
        after.append(run.completed)

    run_recipe(train)
    assert after == [3]


def test_an_exception_of_the_recipe_passes_through(run_recipe):
    def train(run: launcher.Run) -> None:
        raise ZeroDivisionError("the recipe's own")

    with pytest.raises(ZeroDivisionError, match="the recipe's own"):
        run_recipe(train)
    assert status(run_recipe.dir)["status"] == "failed"


def test_evaluation_restores_the_mode_also_after_an_exception(run_recipe):
    modes = []

    def train(run: launcher.Run) -> None:
        model, _, loader = parts(run)
        dropout = run.build(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1)))
        dropout[0].eval()

        def score(batch):
            modes.append((model.training, dropout.training, torch.is_grad_enabled()))
            raise KeyError("score")

        with pytest.raises(KeyError):
            run.average(score, loader)
        modes.append((model.training, dropout[0].training, dropout[1].training))

    run_recipe(train)
    assert modes == [(False, False, False), (True, False, True)]


def test_average_is_exact(run_recipe):
    result = {}

    def train(run: launcher.Run) -> None:
        loader = run.loader(data(21), batch_size=8, shuffle=False)
        result.update(
            run.average(lambda batch: {"x": (batch[0].sum(), batch[0].numel()), "n": (len(batch[0]), 1)}, loader)
        )

    run_recipe(train)
    assert result["x"] == pytest.approx(data(21)[0].double().mean().item(), rel=1e-6)
    assert result["n"] == 7  # 8, 8 and 5 samples


def test_generated_data_is_split(run_recipe):
    sizes = []

    def train(run: launcher.Run) -> None:
        model = run.build(lambda: nn.Linear(3, 1))
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(total=3):
            rollout = {"x": torch.randn(7, 3), "y": torch.randn(7, 1)}
            for batch in step.split(rollout, microbatch_size=3):
                sizes.append(len(batch["x"]))
                step.backward(F.mse_loss(model(batch["x"]), batch["y"], reduction="sum"))
            assert step.count == 7
            optimizer.step()
            optimizer.zero_grad()

    run_recipe(train)
    assert sizes == [3, 3, 1] * 3
    assert sorted(losses(run_recipe.dir)) == [1, 3]


def test_an_evaluation_leaves_what_the_step_draws(run_recipe):
    made = {}

    def train(run: launcher.Run, cfg: Config) -> None:
        model = run.build(lambda: nn.Linear(3, 1))
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        held_out = run.loader((torch.randn(8, 3),), batch_size=4)
        for step in run.steps(total=3):
            if evaluates:
                run.average(lambda batch: {"score": (model(batch[0]).sum(), 4)}, held_out)
            x = torch.randn(4, 3)
            made.setdefault(step.index, []).append((x, random.random(), np.random.rand()))
            for piece in step.split(x, 2):
                step.backward(model(piece).sum())
            optimizer.step()
            optimizer.zero_grad()

    for evaluates in (False, True):
        run_recipe(train, "--run.dir", run_recipe.dir / str(evaluates))
    assert all(torch.equal(a, b) and one == other for (a, *one), (b, *other) in made.values())
    assert not torch.equal(made[0][1][0], made[1][1][0])


def test_a_stop_in_an_evaluation_behind_the_update_waits_for_the_edge(run_recipe, tmp_path):
    """Also where the data is the recipe's own: the update is made, and must not be made again."""

    def train(run: launcher.Run, cfg: Config) -> None:
        model = run.build(lambda: nn.Linear(3, 1))
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        held_out = run.loader((torch.ones(8, 3),), batch_size=4)
        for step in run.steps(total=6):
            for piece in step.split(torch.randn(4, 3), 2):
                step.backward(model(piece).square().sum())
            optimizer.step()
            optimizer.zero_grad()
            if stops and step.index == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            run.average(lambda batch: {"score": (model(batch[0]).sum(), 4)}, held_out)

    for stops, name in ((False, "straight"), (True, "stopped"), (False, "stopped")):  # noqa: B007 - train reads it
        run_recipe(train, "--run.dir", tmp_path / name)
    assert_same(tensors(tmp_path / "straight"), tensors(tmp_path / "stopped"))


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_none_is_one_line(run_recipe, norm):
    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=cfg.steps):
            for x, y in step:
                step.backward(F.mse_loss(model(x), y, reduction="sum"))
            step.clip(norm)
            optimizer.step()

    assert f"step.clip({norm}): give a norm above 0, or infinity to measure" in run_recipe(train, code=1)


def test_two_loaders_each_with_its_count(run_recipe):
    counts = []

    def train(run: launcher.Run) -> None:
        model, optimizer, a = parts(run)
        b = run.loader(data(12), batch_size=4, microbatch_size=2)
        for step in run.steps({"a": a, "b": b}, total=2):
            for batch in step:
                counts.append((len(batch["a"][0]), len(batch["b"][0])))
                step.backward(model(batch["a"][0]).sum(), of="a")
                step.backward(model(batch["b"][0]).sum(), of="b")
            optimizer.step()
            optimizer.zero_grad()

    run_recipe(train)
    assert counts == [(4, 2)] * 4


def test_a_regulariser_is_weighted_by_the_local_count(run_recipe):
    """A term that is no sum over samples, times local_count, keeps its weight however the batch is cut."""
    gradients = []

    def train(run: launcher.Run) -> None:
        model, optimizer, loader = parts(run, microbatch_size=3)
        for step in run.steps(loader, total=1):
            for _ in step:
                step.backward(step.local_count * model.weight.square().sum())
            step.clip(1e9)
            gradients.append((model.weight.grad.clone(), 2 * model.weight.detach().clone()))
            optimizer.zero_grad()

    run_recipe(train)
    torch.testing.assert_close(*gradients[0])


def test_a_count_of_zero_skips_the_update(run_recipe):
    weights = []

    def train(run: launcher.Run) -> None:
        model = run.build(lambda: nn.Linear(3, 1))
        optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
        loader = run.loader(data(), batch_size=4, microbatch_size=2, count=lambda batch: 0)
        for step in run.steps(loader, total=2):
            weights.append(model.weight.detach().clone())
            for x, _ in step:
                step.backward(model(x).sum())
            step.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()

    assert "update skipped" in run_recipe(train)
    assert torch.equal(*weights)


def test_tracked_objects_and_schedulers_come_back(run_recipe):
    class Counter:
        def __init__(self):
            self.n, self.history = 0, torch.zeros(3)

        def state_dict(self):
            return {"n": self.n, "nested": [{"history": self.history}]}

        def load_state_dict(self, state):
            self.n, self.history = state["n"], state["nested"][0]["history"]

    seen = []

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, loader = parts(run)
        counter = Counter()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.inner, step_size=1, gamma=0.5)
        run.track(counter, "counter")
        run.track(scheduler, "scheduler")
        for step in run.steps(loader, total=cfg.steps):
            learn(model, optimizer, step)
            scheduler.step()
            counter.n += 1
            counter.history[step.index % 3] += 1
        seen.append((counter.n, counter.history.tolist(), optimizer.param_groups[0]["lr"]))

    run_recipe(train, "--steps", 3)
    run_recipe(train, "--steps", 5)
    assert seen == [(3, [1, 1, 1], 0.1 / 8), (5, [2, 2, 1], 0.1 / 32)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ((torch.full((3,), float(i)), torch.zeros(1)) for i in range(100))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_goes_on_behind_its_cursor(run_recipe, workers):
    seen = []

    def train(run: launcher.Run, cfg: Config) -> None:
        model, optimizer, _ = parts(run)
        stream = run.loader(Stream(), batch_size=4, microbatch_size=2)
        for step in run.steps(stream, total=cfg.steps):
            for x, y in step:
                seen.extend(x[:, 0].tolist())
                step.backward(F.mse_loss(model(x / 100), y, reduction="sum"))
            optimizer.step()
            optimizer.zero_grad()

    said = run_recipe(train, "--steps", 3, "--run.workers", workers)
    assert "order depends on the world size" in said
    run_recipe(train, "--steps", 5, "--run.workers", workers)
    assert seen == [float(i) for i in range(20)]


def test_a_stream_ends_the_run(run_recipe):
    steps = []

    def train(run: launcher.Run) -> None:
        model, optimizer, _ = parts(run)
        for step in run.steps(run.loader(Stream(), batch_size=30, microbatch_size=10), total=1000):
            steps.append(step.index)
            learn(model, optimizer, step)

    run_recipe(train)
    assert steps == [0, 1, 2]


def recipe_error(body):
    def train(run: launcher.Run) -> None:
        model, optimizer, loader = parts(run)
        for step in run.steps(loader, total=2):
            body(run, model, optimizer, loader, step)

    return train


def no_backward(run, model, optimizer, loader, step):
    optimizer.step()


def early_step(run, model, optimizer, loader, step):
    for x, y in step:
        step.backward(F.mse_loss(model(x), y, reduction="sum"))
        optimizer.step()


def no_reduction(run, model, optimizer, loader, step):
    for x, y in step:
        step.backward(F.mse_loss(model(x), y, reduction="none"))


def half(run, model, optimizer, loader, step):
    for x, y in step:
        step.backward(F.mse_loss(model(x), y, reduction="sum").bfloat16())


def detached(run, model, optimizer, loader, step):
    for x, y in step:
        step.backward(F.mse_loss(model(x), y, reduction="sum").detach())


def outside(run, model, optimizer, loader, step):
    x, y = data(4)
    step.backward(F.mse_loss(model(x), y, reduction="sum"))


def late_build(run, model, optimizer, loader, step):
    run.build(lambda: nn.Linear(1, 1))


def second_loop(run, model, optimizer, loader, step):
    list(run.steps(loader, total=1))


def unknown_loader(run, model, optimizer, loader, step):
    for x, y in step:
        step.backward(F.mse_loss(model(x), y, reduction="sum"), of="b")


def foreign_optimizer(run, model, optimizer, loader, step):
    run.optimizer(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (no_backward, "not whole"),
        (early_step, "not whole"),
        (no_reduction, "reduction='sum'"),
        (half, "fp32"),
        (detached, "without a gradient"),
        (outside, "outside of the loop"),
        (late_build, "after run.steps"),
        (second_loop, "one run has one loop"),
        (unknown_loader, "'loader'"),
        (foreign_optimizer, "after run.steps"),
    ],
)
def test_a_broken_contract_is_one_line(run_recipe, body, said):
    printed = run_recipe(recipe_error(body), code=1)
    assert said in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 4, "microbatch_size": 5}, "the second no larger"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_an_impossible_batch_is_one_line(run_recipe, options, said):
    def train(run: launcher.Run) -> None:
        parts(run, **options)

    printed = run_recipe(train, code=2)
    assert said in printed
    assert "Traceback" not in printed


def test_the_nearest_batches_are_named():
    from launcher.batches import check_batch

    with pytest.raises(launcher.UsageError, match="microbatch_size 4 or batch_size 24"):
        check_batch(12, 8, 3)
    with pytest.raises(launcher.UsageError, match="batch_size 4"):
        check_batch(2, 1, 4)
    with pytest.raises(launcher.UsageError, match="evenly"):
        check_batch(12, 4, 2, stream=True)
    check_batch(13, 4, 2)
    check_batch(16, 4, 2, stream=True)


def test_the_public_names_are_what_they_say():
    assert sorted(launcher.__all__) == sorted(dir(launcher))
    for name in launcher.__all__:
        assert getattr(launcher, name) is not None
    assert callable(launcher.main)


def test_an_optimizer_that_steps_twice_in_a_step_is_clipped_twice(run_recipe):
    norms = []

    def train(run: launcher.Run) -> None:
        model, other = (run.build(lambda: torch.nn.Linear(2, 1), name=name) for name in ("a", "b"))
        first, second = (run.optimizer(torch.optim.SGD(one.parameters(), lr=0.0)) for one in (model, other))
        for step in run.steps(run.loader((torch.ones(8, 2),), batch_size=4), total=2):
            for _ in range(2):
                for (x,) in step:
                    step.backward(1000 * model(x).sum())
                step.clip(1.0)
                norms.append(model.weight.grad.norm().item())
                first.step()
                first.zero_grad()
            for (x,) in step:
                step.backward(other(model(x).detach().expand(-1, 2)).sum())
            second.step()
            second.zero_grad()

    run_recipe(train)
    assert len(norms) == 4
    assert max(norms) <= 1.0
