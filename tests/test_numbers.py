"""Bad numbers in one process: what is told of them, and what a run is afterwards, bit for bit."""

import gc
import json
import math
import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import launcher
from launcher.examine import Examination
from launcher.numbers import Guard
from launcher.order import Slot
from tests.harness import assert_same, metrics, status, tensors

BATCH, MICRO, STEPS = 6, 3, 9
BAD = 25  # the sample: in step 5 (of index 4), micro-batch 0
SKIP = ["--run.bad-numbers", "skip"]
REWIND = ["--run.bad-numbers", "rewind", "--run.save-every", 3]


@dataclass(frozen=True)
class Config:
    steps: int = STEPS
    fused: bool = False
    clip: bool = True
    batchnorm: bool = False


class Root(nn.Module):
    """NaN for what is negative; at 0 its gradient is not finite."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.scale * x).sqrt()


class Model(nn.Module):
    def __init__(self, cfg=Config()):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4) if cfg.batchnorm else nn.Identity()
        self.root = Root()

    def forward(self, x):
        return self.norm(self.linear(x[:, :3]) * self.root(x[:, 3:])).square().sum(1)


def data(bad=None, value=-1.0, size=BATCH * (STEPS + 2)):
    x = torch.rand(size, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    for sample in [] if bad is None else [bad] if isinstance(bad, int) else bad:
        x[sample, 3] = value
    return (x,)


def recipe(samples, *, omit=(), ends=None, made=None):
    """A train function; at the steps `omit` it does not call its optimizer."""

    def train(run: launcher.Run, cfg: Config) -> None:
        model = run.build(lambda: Model(cfg))
        optimizer = run.optimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=cfg.fused))
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer.inner, 0.5, 1.0, 5)
        run.track(scheduler, "scheduler")
        ema = launcher.EMA(run, model, decay=0.5)
        loader = run.loader(samples, batch_size=BATCH, microbatch_size=MICRO, shuffle=False)
        for step in run.steps(loader, **(ends or {"total": cfg.steps})):
            if made is not None:
                made.append((step.index, step.total))
            for (x,) in step:
                step.backward(model(x).sum())
            if cfg.clip:
                step.log(norm=step.clip(1.0))
            if step.index not in omit:
                optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            ema.update()

    return train


LOG = ["--run.log-every", 1]
NAN = f"step 5: the loss is nan in micro-batch 0 (samples 24, {BAD}, 26)"


@pytest.mark.parametrize("clip", [True, False])
def test_stop_names_the_samples_and_the_module(run_recipe, clip):
    said = run_recipe(recipe(data(BAD)), *LOG, "--run.save-every", 3, "--clip" if clip else "--no-clip", code=1)
    assert (
        f"{NAN}; first, the output of model.root (Root) is nan, for sample {BAD}; the update was not made: "
        "look at the samples, or leave such updates out with --run.bad-numbers skip\n"
    ) in said
    assert "Traceback" not in said
    failed = json.loads((run_recipe.dir / "attempts/1/failed").read_text())
    assert failed["step"] == 4
    assert status(run_recipe.dir)["status"] == "failed"
    assert [path.name for path in (run_recipe.dir / "checkpoints").iterdir()] == ["step-00000003"]
    assert sorted(metrics(run_recipe.dir)) == [1, 2, 3, 4]


def test_stop_names_a_gradient_of_a_finite_loss(run_recipe):
    said = run_recipe(recipe(data(BAD, 0.0)), code=1)
    assert "step 5: a gradient is not finite, though every loss is (samples 24, 25, 26, 27, 28, 29); first" in said
    assert "first, the gradient of model.root.scale is nan; the update was not made" in said


def test_a_stopped_run_goes_on_with_skip(run_recipe):
    run_recipe(recipe(data(BAD)), "--run.save-every", 3, code=1)
    said = run_recipe(recipe(data(BAD)), "--run.save-every", 3, *SKIP)
    assert "resumed" in said
    assert f"{NAN.replace('step 5:', 'step 5: update skipped:')}\n" in said


@pytest.mark.parametrize("options", [[], ["--fused"], ["--no-clip"], ["--batchnorm"]], ids=" ".join)
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_skip_is_a_run_whose_update_was_left_out(run_recipe, tmp_path, options, value):
    said = run_recipe(recipe(data(BAD, value)), *LOG, *SKIP, *options, "--run.dir", tmp_path / "a")
    assert said.count("update skipped") == 1
    good = data(BAD, 0.7) if "--batchnorm" not in options else data(BAD, value)
    if "--batchnorm" not in options:
        run_recipe(recipe(good, omit=[4]), *LOG, *options, "--run.dir", tmp_path / "b")
        assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(tmp_path / "a").values())
    lines = metrics(tmp_path / "a")
    assert {step: line["skipped"] for step, line in lines.items() if "skipped" in line} == {5: 1}
    assert (lines[5]["loss"] is None) == (value < 0)
    assert "NaN" not in (tmp_path / "a" / "metrics.jsonl").read_text()


def test_the_first_step_of_all_may_be_skipped(run_recipe, tmp_path):
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        said = run_recipe(recipe(data(1)), *SKIP, "--run.save-every", 1, "--run.dir", tmp_path / "a")
    assert "step 1: update skipped" in said


def test_batchnorm_forgets_what_a_skipped_step_had(run_recipe, tmp_path):
    """One step of four: its statistics are those of the three others."""
    for name, samples, steps in (("a", data([18, 19]), 4), ("b", data(), 3)):
        run_recipe(recipe(samples), *SKIP, "--batchnorm", "--steps", steps, "--run.dir", tmp_path / name)
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(a[f"model/norm.{name}"], b[f"model/norm.{name}"])


def test_so_many_in_a_row_and_no_more(run_recipe, tmp_path):
    bad = [12, 18, 24, 36]  # steps 3, 4, 5 and 7
    said = run_recipe(recipe(data(bad)), *LOG, *SKIP, "--run.dir", tmp_path / "a")
    assert said.count("update skipped") == 4
    assert metrics(tmp_path / "a")[7]["skipped"] == 4
    said = run_recipe(recipe(data(bad)), *SKIP, "--run.bad-numbers-limit", 2, "--run.dir", tmp_path / "b", code=1)
    assert said.count("update skipped") == 2
    assert "step 5: the loss is nan" in said
    assert "for sample 24; the update was not made, nor were the 2 before it (--run.bad-numbers-limit): look" in said


def test_what_is_counted_is_in_the_checkpoint(run_recipe):
    bad = [12, 18, 24]
    options = [*SKIP, "--run.bad-numbers-limit", 2]
    run_recipe(recipe(data(bad)), *options, "--steps", 4)
    assert "nor were the 2 before it" in run_recipe(recipe(data(bad)), *options, code=1)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_rewind_is_a_run_without_the_samples(run_recipe, tmp_path, value):
    said = run_recipe(recipe(data(BAD, value)), *LOG, *REWIND, "--run.dir", tmp_path / "a")
    assert "; back to step-00000003, and on without the samples of this step\n" in said
    [x] = data(BAD, value)
    never = (torch.cat([x[:24], x[30:]]),)
    run_recipe(recipe(never), *LOG, *REWIND, "--run.dir", tmp_path / "b")
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    ours, theirs = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert {step: line["loss"] for step, line in ours.items()} == {step: line["loss"] for step, line in theirs.items()}
    lines = [json.loads(text) for text in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    [back] = [line for line in lines if "rewound_from" in line]
    assert (back["step"], back["rewound_from"], back["loss"]) == (3, 5, ours[3]["loss"])
    assert [line["step"] for line in lines].count(4) == 2


def test_a_rewind_to_an_earlier_start_keeps_its_line(run_recipe):
    run_recipe(recipe(data(BAD)), *LOG, "--steps", 3)
    before = metrics(run_recipe.dir)[3]
    said = run_recipe(recipe(data(BAD)), *LOG, "--run.bad-numbers", "rewind", "--run.save-every", 9, "--steps", 8)
    assert "; back to step-00000003, and on" in said
    assert metrics(run_recipe.dir)[3] == before | {"attempt": 2}


def test_rewind_again_and_again(run_recipe, tmp_path):
    """The samples that take the place of the bad ones are bad too; then those of a later step."""
    bad = [25, 31, 50]
    said = run_recipe(recipe(data(bad)), *REWIND, "--run.dir", tmp_path / "a")
    assert said.count("; back to step-0000000") == 3
    [x] = data()
    never = (torch.cat([x[:24], x[36:48], x[54:]]),)
    run_recipe(recipe(never), "--steps", 8, *REWIND, "--run.dir", tmp_path / "b")
    run_recipe(recipe(data(bad)), *REWIND, "--steps", 8, "--run.dir", tmp_path / "c")
    assert_same(tensors(tmp_path / "c"), tensors(tmp_path / "b"))
    said = run_recipe(recipe(data(bad)), *REWIND, "--run.bad-numbers-limit", 1, "--run.dir", tmp_path / "d", code=1)
    assert "nor were the 1 before it" in said


class Collected(Dataset):
    """Writes down whether Python's collector runs where it is read."""

    def __init__(self, rows, log):
        self.rows, self.log = rows, log

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, sample):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {gc.isenabled()}\n")
        return (self.rows[sample],)


def test_workers_that_a_rewind_starts_collect_their_garbage(run_recipe, tmp_path):
    run_recipe(recipe(Collected(*data(BAD), tmp_path / "log")), *REWIND, "--run.workers", 1)
    found = {line.split()[0]: line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}
    assert list(found.values()) == ["True", "True"], "one worker before the rewind, one after it"


def test_a_bad_step_right_behind_a_checkpoint(run_recipe, tmp_path):
    said = run_recipe(recipe(data([19, 25])), *REWIND, "--run.dir", tmp_path / "a")
    assert said.count("step 4: the loss is nan") == 2
    assert said.count("back to step-00000003") == 2
    [x] = data()
    run_recipe(recipe((torch.cat([x[:18], x[30:]]),)), *REWIND, "--run.dir", tmp_path / "b")
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_rewind_without_a_checkpoint_stops(run_recipe):
    said = run_recipe(recipe(data(7)), *REWIND, code=1)
    assert "the update was not made, and there is no checkpoint to go back to: look at the samples" in said
    assert "step 2: the loss is nan in micro-batch 0 (samples 6, 7, 8); first, the output of model.root" in said


def test_epochs_end_where_the_data_does(run_recipe, tmp_path):
    """A batch that is left out makes the run a step shorter, from that step on."""
    made = []
    run_recipe(recipe(data(BAD, size=45), ends={"epochs": 1}, made=made), *REWIND)
    assert [total for index, total in made if index < 4] == [8] * 5
    assert [total for index, total in made if index >= 4] == [8, 7, 7, 7]
    assert status(run_recipe.dir)["global_step"] == 7
    last = data(44, size=45)
    run_recipe(recipe(last, ends={"epochs": 1}), *REWIND, "--run.dir", tmp_path / "last")
    assert status(tmp_path / "last")["global_step"] == 7


def leaping(run: launcher.Run, cfg: Config) -> None:
    """A loss that is 1, and 100 from step 14 on."""
    model = run.build(lambda: nn.Linear(1, 1, bias=False))
    optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.ones(60, 1)
    x[26] = 100
    loader = run.loader((x,), batch_size=2, shuffle=False)
    for step in run.steps(loader, total=cfg.steps):
        for (batch,) in step:
            step.backward((model(batch) / model.weight.detach() * batch.detach().sign()).sum())
        optimizer.step()
        optimizer.zero_grad()


def test_a_leap_of_the_loss(run_recipe, tmp_path):
    run_recipe(leaping, "--steps", 20)  # the rule is off
    options = ["--run.spike", 10, "--steps", 20, *LOG]
    said = run_recipe(leaping, *options, "--run.dir", tmp_path / "stop", code=1)
    assert (
        "step 14: the loss 50.5 is 50.5 times the median of the last 13 (samples 26, 27); the update was not made: "
        "look at the samples, raise --run.spike, or leave such updates out with --run.bad-numbers skip\n"
    ) in said
    said = run_recipe(leaping, *options, *SKIP, "--run.dir", tmp_path / "skip")
    assert said.count("step 14: update skipped: the loss 50.5 is") == 1
    assert metrics(tmp_path / "skip")[14]["loss"] == 50.5
    said = run_recipe(leaping, *options, *REWIND, "--run.dir", tmp_path / "rewind")
    assert "; back to step-000000" in said
    assert metrics(tmp_path / "rewind")[14]["loss"] == 1.0


def test_the_median_is_of_steps_before_a_resume_too(run_recipe):
    options = ["--run.spike", 10, "--run.save-every", 4]
    run_recipe(leaping, *options, "--steps", 12)
    assert "the median of the last 13" in run_recipe(leaping, *options, "--steps", 20, code=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run.bad-numbers", "rewind"], "give --run.save-every N too"),
        (["--run.bad-numbers-limit", 0], "--run.bad-numbers-limit 0: at least 1"),
        (["--run.spike", 1], "a factor above 1"),
        (["--run.spike", "nan"], "a factor above 1"),
    ],
)
def test_what_cannot_be_is_refused(run_recipe, options, said):
    assert said in run_recipe(recipe(data()), *options, code=2)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        yield from ((x,) for x in self.samples[0])


def test_a_stream(run_recipe, tmp_path):
    stream = Stream(data(BAD))
    assert "'loader' is a stream" in run_recipe(recipe(stream), *REWIND, "--run.dir", tmp_path / "a", code=2)
    said = run_recipe(recipe(stream), "--run.dir", tmp_path / "b", code=1)
    assert "micro-batch 0 (samples 24 to 26 of the stream); first, the output of model.root (Root) is nan" in said
    assert "update skipped" in run_recipe(recipe(stream), *SKIP, "--run.dir", tmp_path / "c")


def test_data_of_the_recipes_own(run_recipe, tmp_path):
    def train(run: launcher.Run) -> None:
        model = run.build(Model)
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(total=4):
            x = torch.rand(5, 4) + 0.1
            x[4, 3] = -1.0 if step.index == 2 else 1.0
            for piece in step.split(x, 2):
                step.backward(model(piece).sum())
            optimizer.step()
            optimizer.zero_grad()

    said = run_recipe(train, "--run.dir", tmp_path / "a", code=1)
    assert "step 3: the loss is nan in micro-batch 2 (rows 4 to 4 of what step.split got); first, the output" in said
    assert "the recipe makes its data itself" in run_recipe(train, *REWIND, "--run.dir", tmp_path / "b", code=2)


def game(bad_player, seen):
    """Two players, two passes over each step; one player's loss is NaN in step 2."""

    def train(run: launcher.Run) -> None:
        models = [run.build(lambda: nn.Linear(4, 1)) for _ in range(2)]
        optimizers = [run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1)) for model in models]
        for step in run.steps(run.loader(data(), batch_size=BATCH, microbatch_size=MICRO), total=3):
            for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                before = model.weight.detach().clone()
                for (x,) in step:
                    factor = math.nan if (k, step.index) == (bad_player, 1) else 1.0
                    step.backward(model(x).sum() * factor)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(not torch.equal(before, model.weight))

    return train


def test_after_one_refused_update_a_step_makes_none(run_recipe, tmp_path):
    seen = []
    said = run_recipe(game(0, seen), *SKIP, "--run.dir", tmp_path / "a")
    assert seen == [True, True, False, False, True, True]
    assert said.count("step 2: update skipped: the loss is nan in micro-batch 0 (") == 1
    seen.clear()
    said = run_recipe(game(1, seen), *SKIP, "--run.dir", tmp_path / "b")
    assert seen == [True, True, True, False, True, True], "what was applied before stays"
    assert "step 2: update skipped: the loss is nan in micro-batch 0, pass 2 (" in said
    said = run_recipe(game(1, seen), "--run.dir", tmp_path / "c", code=1)
    assert "micro-batch 0, pass 2 (" in said
    assert "first, the loss is nan, of outputs that are finite; the update" in said


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_one_loss_all_optimizers_step_or_none(run_recipe, order):
    def train(run: launcher.Run) -> None:
        model = run.build(Model)
        inner = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.linear, model.root)]
        optimizers = [run.optimizer(inner[k]) for k in order]
        for step in run.steps(run.loader(data(1, 0.0), batch_size=BATCH, shuffle=False), total=1):
            before = model.linear.weight.detach().clone()
            for (x,) in step:
                step.backward(model(x).sum(), len(x))
            for optimizer in optimizers:
                optimizer.step()
            assert torch.equal(before, model.linear.weight)

    assert "step 1: update skipped: a gradient is not finite, though every loss is" in run_recipe(train, *SKIP)


def test_a_buffer_that_stays_bad_is_not_skipped(run_recipe):
    class Remembers(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("largest", torch.zeros(()))

        def forward(self, x):
            y = super().forward(x)
            self.largest.copy_(y.detach().max())
            return y

    def train(run: launcher.Run) -> None:
        model = run.build(Remembers)
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(run.loader(data(1), batch_size=BATCH, shuffle=False), total=2):
            for (x,) in step:
                step.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()

    assert "its forward pass has left NaN in model/largest" in run_recipe(train, *SKIP, code=1)


def test_a_recipe_that_leaves_on_its_own_is_not_saved(run_recipe):
    def train(run: launcher.Run) -> None:
        model = run.build(Model)
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(run.loader(data(7), batch_size=BATCH, shuffle=False), total=4):
            for (x,) in step:
                step.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()
            if step.index == 1:
                break

    assert "step 2: the loss is nan in micro-batch 0" in run_recipe(train, code=1)
    assert not (run_recipe.dir / "checkpoints").exists()


def test_the_data_itself_and_a_step_that_does_not_repeat(run_recipe, tmp_path):
    x = data(BAD, math.inf)
    assert "first, the data itself has inf, for sample 25" in run_recipe(recipe(x), "--run.dir", tmp_path / "a", code=1)
    calls = []

    def train(run: launcher.Run) -> None:
        model = run.build(Model)
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(run.loader(data(), batch_size=BATCH), total=4):
            assert step.every(2) == (step.index in (0, 2) and calls != [2])
            for (x,) in step:
                calls.extend([2] * (step.index == 2))
                step.backward(model(x).sum() * (math.nan if calls == [2] else 1.0))
            optimizer.step()
            optimizer.zero_grad()

    said = run_recipe(train, "--run.dir", tmp_path / "b", code=1)
    assert "; run once more, all of it was finite; the update was not made" in said


class Shift(nn.Module):
    """Its own gradient is finite."""

    def forward(self, x):
        return x + 0.0


def looked_into(model, x, rank=0):
    """What an examination finds in one micro-batch: where, and in which rows."""
    examination = Examination({"model": model}, rank)
    with examination.attached(eager=False):
        examination.enter(0, Slot(0, 0, 0, len(x)), {"x": x})
        loss = model(x).sum()
        examination.loss(loss.detach())
        loss.backward()
        examination.gradients()
    return [(finding.what, finding.rows) for finding in examination.findings]


def test_where_a_bad_number_begins():
    good = torch.ones(3, 2)
    zero, negative = good.clone(), good.clone()
    zero[1, 0], negative[2, 1] = 0.0, -1.0
    model = nn.Sequential(
        Shift(), nn.LeakyReLU(1.0, inplace=True), nn.Sequential(Root(), nn.Identity()), nn.Linear(2, 1)
    )
    assert looked_into(model, good) == []
    found = looked_into(model, negative)
    assert found[0] == ("the output of model.2.0 (Root) is nan", (2,))
    assert len([one for one in found if "parameter" not in one[0]]) == 2, "then the first parameter"
    found = looked_into(model, zero.requires_grad_())
    assert found[0] == ("the gradient that model.2.0 (Root) gives its input is inf", (1,))
    assert looked_into(model, torch.full((3, 2), math.nan))[0] == ("the data itself has nan", ())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def late(monkeypatch):
    """The host looks a step late, as it does on a GPU."""
    monkeypatch.setattr(Guard, "_looks_late", lambda self: True)


@pytest.mark.parametrize("bad", [BAD, 49], ids=["midway", "last-step"])
def test_late_stop_of_a_fused_optimizer_keeps_the_weights(run_recipe, late, bad):
    step = bad // BATCH + 1
    said = run_recipe(recipe(data(bad)), *LOG, "--fused", "--run.save-every", 3, code=1)
    assert f"step {step}: the loss is nan in micro-batch 0" in said
    assert f"first, the output of model.root (Root) is nan, for sample {bad}; the update was not made" in said
    assert json.loads((run_recipe.dir / "attempts/1/failed").read_text())["step"] == step - 1
    assert sorted(metrics(run_recipe.dir)) == list(range(1, step))


def test_late_stop_of_another_optimizer_says_less(run_recipe, late):
    said = run_recipe(recipe(data(BAD)), code=1)
    assert NAN in said
    assert "where it began cannot be seen any more (with fused=True in the optimizer it can)" in said
    assert not (run_recipe.dir / "checkpoints").exists()


@pytest.mark.parametrize("value", [-1.0, 0.0])
@pytest.mark.parametrize("bad", [BAD, 49], ids=["midway", "last-step"])
def test_late_skip_is_a_run_whose_update_was_left_out(run_recipe, tmp_path, late, bad, value):
    said = run_recipe(recipe(data(bad, value)), *LOG, *SKIP, "--fused", "--run.dir", tmp_path / "a")
    assert said.count("update skipped") == 1
    run_recipe(recipe(data(bad, 0.7), omit=[bad // BATCH]), *LOG, "--fused", "--run.dir", tmp_path / "b")
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    lines = metrics(tmp_path / "a")
    assert {step: line["skipped"] for step, line in lines.items() if "skipped" in line} == {bad // BATCH + 1: 1}
    assert sorted(lines) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize("bad", [BAD, 49], ids=["midway", "last-step"])
def test_late_rewind_is_a_run_without_the_samples(run_recipe, tmp_path, late, bad, fused):
    said = run_recipe(recipe(data(bad)), *LOG, *REWIND, fused, "--run.dir", tmp_path / "a")
    assert said.count("; back to step-0000000") == 1
    [x] = data()
    start = bad // BATCH * BATCH
    run_recipe(recipe((torch.cat([x[:start], x[start + 6 :]]),)), *LOG, *REWIND, fused, "--run.dir", tmp_path / "b")
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    ours, theirs = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert {step: line["loss"] for step, line in ours.items()} == {step: line["loss"] for step, line in theirs.items()}


@pytest.mark.parametrize("value", [-1.0, 0.0], ids=["loss", "gradient"])
def test_under_a_gradient_scaler_a_loss_is_bad_and_an_overflow_is_not(run_recipe, value):
    scales = []

    def train(run: launcher.Run) -> None:
        run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        model = run.build(Model)
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(run.loader(data([1, 7, 13], value), batch_size=BATCH, shuffle=False), total=3):
            scales.append(run.scaler.get_scale())
            for (x,) in step:
                step.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()

    if value < 0:
        said = run_recipe(train, *SKIP)
        assert said.count("update skipped: the loss is nan") == 3
        assert scales == [4.0, 4.0, 4.0]
    else:
        said = run_recipe(train, *SKIP)
        assert said.count("update skipped: fp16 overflow") == 2
        assert "step 3: update skipped: a gradient is not finite, though every loss is" in said
        assert scales == [4.0, 2.0, 1.0]
