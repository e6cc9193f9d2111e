"""What a run keeps of its checkpoints, what it starts from, and what it passes over."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import launcher
from launcher import checkpoint
from launcher.checkpoint.retention import Best, Retention
from launcher.world import World
from tests.checkpoint_files import rewrite
from tests.harness import assert_same, losses, status, tensors
from tests.test_bad_inputs import one_line


@dataclass(frozen=True)
class Config:
    steps: int = 12
    eval_every: int = 2
    width: int = 8
    frozen: bool = False


class Net(nn.Module):
    def __init__(self, width: int, frozen: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 3)
        self.blocks[0].requires_grad_(not frozen)

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


SCORES = {2: 0.5, 4: 0.2, 6: 0.9, 8: 0.3, 10: float("nan")}


def train(run: launcher.Run, cfg: Config) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, cfg.width, generator=generator), torch.randn(40, 3, generator=generator)
    loader = run.loader((x, y), batch_size=8, microbatch_size=4)
    model = run.build(lambda: Net(cfg.width, cfg.frozen))
    optimizer = run.optimizer(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    for step in run.steps(loader, total=cfg.steps):
        if step.every(cfg.eval_every):
            step.log(score=SCORES.get(step.index, 0.6))
        for inputs, targets in step:
            step.backward(F.mse_loss(model(inputs), targets, reduction="sum"))
        optimizer.step()
        optimizer.zero_grad()


def steps(rundir):
    return checkpoint.Store(rundir / "checkpoints").steps()


@pytest.mark.parametrize(
    ("best", "kept"), [(None, {10, 12}), (Best("score"), {4, 10, 12}), (Best("score", greatest=True), {6, 10, 12})]
)
def test_the_last_the_every_nth_and_the_best_are_kept(best, kept):
    retention = Retention(2, 0, best)
    assert retention.kept(range(2, 14, 2), SCORES) == kept
    assert Retention(2, 4, best).kept(range(2, 14, 2), SCORES) == kept | {4, 8, 12}
    assert retention.kept([2, 6], {}) == {2, 6}
    assert retention.kept([], {}) == set()


def test_of_equal_scores_the_first_is_best():
    assert Best("x").step({3: 1.0, 5: 1.0, 7: 2.0}) == 3
    assert Best("x", greatest=True).step({3: float("nan")}) is None


def save_always(run_recipe, *options, **how):
    """A run that waits for each save, so that none is put off."""

    def waiting(run: launcher.Run, cfg: Config) -> None:
        start = run.saver.start

        def and_wait(loop):
            start(loop)
            assert run.saver.writer.wait(30)

        run.saver.start = and_wait
        train(run, cfg)

    return run_recipe(waiting, "--run.save-every", 2, *options, **how)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], [10, 12]),
        (["--run.keep", 1], [12]),
        (["--run.keep", 1, "--run.keep-every", 6], [6, 12]),
        (["--run.keep", 1, "--run.keep-best", "score:min"], [4, 12]),
        (["--run.keep", 1, "--run.keep-best", "score:max"], [6, 12]),
    ],
)
def test_a_run_keeps_what_it_was_told_to(run_recipe, options, kept):
    save_always(run_recipe, *options)
    assert steps(run_recipe.dir) == kept
    for path in (run_recipe.dir / "checkpoints").iterdir():
        checkpoint.verify(path)
        assert (path / "verified").exists()


def test_a_metric_that_nobody_logs_is_told(run_recipe):
    with pytest.warns(UserWarning, match="no step of the checkpoints has a nothing"):
        save_always(run_recipe, "--run.keep", 1, "--run.keep-best", "nothing:min")
    assert steps(run_recipe.dir) == [12]


def test_each_pattern_must_name_a_weight(run_recipe, tmp_path):
    base = tmp_path / "base"
    run_recipe(train, "--steps", 1, "--run.dir", base)
    only = ["--run.init-from", base, "--run.init-only", "blocks.*", "haed.*"]
    assert "--run.init-only haed.*: no weight has such a name" in one_line(run_recipe(train, *only, code=2))


def test_what_a_dead_attempt_told_of_later_steps_is_not_the_best(tmp_path):
    from launcher.scores import scores

    lines = [(1, 10, 0.9), (1, 20, 0.5), (1, 30, 0.1), (2, 21, None), (2, 31, None), (2, 40, 0.6)]
    texts = [
        json.dumps({"attempt": a, "step": step} | ({} if value is None else {"val": value})) for a, step, value in lines
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    assert scores(tmp_path / "metrics.jsonl", "val") == {10: 0.9, 20: 0.5, 40: 0.6}


def test_the_best_of_an_earlier_start_is_still_the_best(run_recipe):
    options = ["--run.keep", 1, "--run.keep-best", "score:min"]
    save_always(run_recipe, *options, "--steps", 6)
    assert steps(run_recipe.dir) == [4, 6]
    save_always(run_recipe, *options, "--steps", 12)
    assert steps(run_recipe.dir) == [4, 12]


@pytest.mark.parametrize("text", ["score", "score:", ":min", "score:least", ""])
def test_a_rule_for_the_best_that_is_none_is_told(run_recipe, text):
    assert "METRIC:min or METRIC:max" in one_line(run_recipe(train, "--run.keep-best", text, code=2))


def test_an_interrupted_prune_and_a_killed_save_are_finished_at_the_next_start(run_recipe):
    save_always(run_recipe)
    root = run_recipe.dir / "checkpoints"
    for name in ("step-00000004.pruned", "step-00000014.partial-1"):
        shutil.copytree(root / "step-00000012", root / name)
    run_recipe(train, "--steps", 13)
    assert {path.name for path in root.iterdir()} == {"step-00000012", "step-00000013"}


def damage(path):
    [file] = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_if_it_had_not_been(run_recipe, tmp_path):
    straight = tmp_path / "straight"
    save_always(run_recipe, "--run.dir", straight)
    save_always(run_recipe, "--steps", 8)
    damage(run_recipe.dir / "checkpoints/step-00000008")
    bad = (run_recipe.dir / "checkpoints/step-00000008" / "index.json").read_bytes()
    said = save_always(run_recipe, "--steps", 12)
    assert "PASSED OVER step-00000008, which is now step-00000008.bad: step-00000008/node-00000" in one_line(said)
    assert "step-00000006 at step 6" in said
    assert (run_recipe.dir / "checkpoints/step-00000008.bad/index.json").read_bytes() == bad
    assert_same(tensors(run_recipe.dir), tensors(straight))
    assert losses(run_recipe.dir) == losses(straight)


def test_a_checkpoint_of_another_version_is_never_passed_over(run_recipe):
    save_always(run_recipe)
    index = run_recipe.dir / "checkpoints/step-00000012/index.json"
    body = json.loads(index.read_bytes())["index"]
    rewrite(index.parent, body | {"format": 99})
    assert "update the launcher" in one_line(run_recipe(train, "--steps", 13, code=1))
    assert steps(run_recipe.dir) == [10, 12]


def test_imported_weights_are_not_taken_for_a_run(run_recipe, tmp_path):
    state = checkpoint.State({"model/w": torch.ones(3)})
    path = checkpoint.save(checkpoint.Store(tmp_path / "weights"), World(), 0, state, attempt=1)
    said = one_line(run_recipe(train, "--run.resume", path, code=1))
    assert "holds weights and no run: start from them with --run.init-from" in said


# Starting from the weights of another run


def test_a_part_of_another_runs_weights_by_name(run_recipe, tmp_path):
    base, fresh = tmp_path / "base", tmp_path / "fresh"
    run_recipe(train, "--steps", 3, "--run.dir", base)
    built = {}

    def looking(run: launcher.Run, cfg: Config) -> None:
        model = run.build(lambda: Net(cfg.width, cfg.frozen))
        built.update({f"model/{name}": p.detach().clone() for name, p in model.named_parameters()})

    run_recipe(looking, "--run.dir", fresh)
    as_built = dict(built)
    said = run_recipe(
        looking, "--run.dir", tmp_path / "part", "--run.init-from", base, "--run.init-only", "blocks.*.weight"
    )
    trained = tensors(base)
    for name, tensor in built.items():
        taken = name.startswith("model/blocks") and name.endswith("weight")
        assert torch.equal(tensor, trained[name] if taken else as_built[name]), name
    assert "'model' begins with 2 weights of" in said
    assert "as built model/blocks.0.bias, model/blocks.1.bias, model/head.bias, model/head.weight" in said
    assert "not taken model/blocks.0.bias" in said


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--width", 9], 1, "model/blocks.0.bias is 8 there and 9 here"),
        (["--run.init-only", "blokcs.*"], 2, "--run.init-only blokcs.*: no weight has such a name"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(run_recipe, tmp_path, options, code, said):
    base = tmp_path / "base"
    run_recipe(train, "--steps", 1, "--run.dir", base)
    assert said in one_line(run_recipe(train, "--run.init-from", base, *options, code=code))


def test_what_is_missing_and_what_is_left_over_is_listed(run_recipe, tmp_path):
    base = tmp_path / "base"
    run_recipe(train, "--steps", 1, "--run.dir", base)

    def other(run: launcher.Run, cfg: Config) -> None:
        run.build(lambda: nn.Sequential(nn.Linear(8, 3)))

    said = one_line(run_recipe(other, "--run.init-from", base, code=1))
    assert "of 'model' it lacks model/0.bias, model/0.weight" in said
    assert "it also has model/blocks.0.bias, model/blocks.0.weight" in said


def test_init_only_without_init_from_is_told(run_recipe):
    assert "--run.init-from, which is not given" in one_line(run_recipe(train, "--run.init-only", "x", code=2))


def test_frozen_weights_come_from_there_too_and_again_on_resume(run_recipe, tmp_path):
    base = tmp_path / "base"
    run_recipe(train, "--steps", 3, "--run.dir", base)
    start = ["--run.init-from", base, "--frozen"]
    straight = tmp_path / "straight"
    run_recipe(train, *start, "--steps", 6, "--run.dir", straight)
    run_recipe(train, *start, "--steps", 4)
    run_recipe(train, *start, "--steps", 6)
    assert losses(run_recipe.dir) == losses(straight)
    assert "model/blocks.0.weight" not in tensors(straight)
    shutil.rmtree(base)
    said = one_line(run_recipe(train, *start, "--steps", 7, code=2))
    assert "--run.init-from" in said


def test_what_could_not_be_saved_is_refused_before_the_first_step(run_recipe):
    def complex_(run: launcher.Run, cfg: Config) -> None:
        model = run.build(lambda: nn.Linear(8, 3))
        model.register_buffer("phases", torch.zeros(3, dtype=torch.complex64))
        for _ in run.steps(run.loader((torch.zeros(8, 8),), batch_size=8), total=3):
            raise AssertionError("a step was begun")

    assert "model/phases is torch.complex64, which a checkpoint cannot hold" in one_line(run_recipe(complex_, code=1))


def test_the_time_of_a_save_is_recorded(run_recipe):
    save_always(run_recipe)
    facts = status(run_recipe.dir)
    assert facts["checkpoint"] == "step-00000012"
    assert 0 <= facts["save_blocked_seconds"] <= facts["save_seconds"] > 0


# What cannot be saved, what cannot be read, and who is told


class Plain:
    """Something to track."""

    def __init__(self, **values):
        self.values = values

    def state_dict(self):
        return dict(self.values)

    def load_state_dict(self, state):
        self.values = state


def tracking(obj, **how):
    def tracked(run: launcher.Run, cfg: Config) -> None:
        run.track(obj, "it", **how)
        train(run, cfg)

    return tracked


@pytest.mark.parametrize("per_rank", [False, True])
def test_infinite_numbers_are_saved(run_recipe, per_rank):
    values = {"best": float("inf"), "worst": -float("inf"), "list": [float("inf")], 3: (1, 2.5)}
    run_recipe(tracking(Plain(**{"best": 0.0}), per_rank=per_rank), "--run.dir", run_recipe.dir.parent / "other")
    kept = Plain()
    kept.values = dict(values)
    run_recipe(tracking(kept, per_rank=per_rank), "--steps", 2)
    found = Plain()
    found.values = dict.fromkeys(values)
    run_recipe(tracking(found, per_rank=per_rank), "--steps", 3)
    assert found.values == values


@pytest.mark.parametrize(
    ("values", "how", "said"),
    [
        ({"set": {1}}, {}, "it/set is a set"),
        ({"set": {1}}, {"per_rank": True}, "it/set is a set"),
        ({"tensor": torch.ones(2)}, {"per_rank": True}, "it/tensor is a tensor; give numbers and text"),
        ({"int": 1 << 5000}, {}, "an integer of more than 4096 bits"),
    ],
)
def test_what_cannot_be_tracked_is_told_before_the_first_step(run_recipe, values, how, said):
    assert said in one_line(run_recipe(tracking(Plain(**values), **how), "--run.log-every", 1, code=1))
    assert not losses(run_recipe.dir) if (run_recipe.dir / "metrics.jsonl").exists() else True


class Odd(torch.optim.SGD):
    """Keeps something that belongs to no parameter."""

    def step(self, closure=None):
        self.state["everything"]["steps"] = self.state["everything"].get("steps", 0) + 1
        return super().step(closure)


def test_an_optimizers_state_of_no_parameter_is_told_after_one_step(run_recipe):
    def odd(run: launcher.Run, cfg: Config) -> None:
        model = run.build(lambda: nn.Linear(3, 1))
        optimizer = run.optimizer(Odd(model.parameters(), lr=0.1))
        for step in run.steps(run.loader((torch.ones(8, 3),), batch_size=8), total=3):
            assert step.index == 0
            for (x,) in step:
                step.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()

    assert "Odd keeps 'steps' under 'everything', which is no parameter" in one_line(run_recipe(odd, code=1))


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_a_modules_extra_state_is_restored(run_recipe):
    seen = []

    def counting(run: launcher.Run, cfg: Config) -> None:
        model = run.build(lambda: nn.Sequential(Counting(3, 1)))
        optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in run.steps(run.loader((torch.ones(8, 3),), batch_size=8), total=cfg.steps):
            for (x,) in step:
                step.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()
        seen.append(model[0].calls)

    run_recipe(counting, "--steps", 3)
    run_recipe(counting, "--steps", 5)
    assert seen == [3, 5]


def test_an_untied_checkpoint_does_not_start_a_tied_model(run_recipe, tmp_path):
    def build(tied):
        def make():
            model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
            if tied:
                model[1].weight = model[0].weight
            return model

        def recipe(run: launcher.Run, cfg: Config) -> None:
            model = run.build(make)
            optimizer = run.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            for step in run.steps(run.loader((torch.ones(8, 3),), batch_size=8), total=1):
                for (x,) in step:
                    step.backward(model(x).sum())
                optimizer.step()

        return recipe

    run_recipe(build(tied=False), "--run.dir", tmp_path / "untied")
    said = one_line(run_recipe(build(tied=True), "--run.init-from", tmp_path / "untied", code=1))
    assert "model/1.weight is tied to model/0.weight here and has data of its own there" in said


def test_a_run_that_goes_on_from_anothers_checkpoint_has_one_of_its_own_at_once(run_recipe, tmp_path):
    base = tmp_path / "base"
    run_recipe(train, "--steps", 4, "--run.dir", base)
    run_recipe(train, "--steps", 4, "--run.resume", base)
    assert steps(run_recipe.dir) == [4]
    shutil.rmtree(base)
    run_recipe(train, "--steps", 5)
    assert steps(run_recipe.dir) == [4, 5]
    assert set(losses(run_recipe.dir)) == {4, 5}, "the line of step 4 is the checkpoint's"


def test_what_one_machine_cannot_read_is_not_called_damaged(run_recipe, monkeypatch):
    import os

    from launcher.checkpoint import files

    save_always(run_recipe, "--steps", 4)
    opened = os.open

    def stale(path, *arguments, **options):
        if str(path).endswith(".safetensors"):
            raise OSError(116, "Stale file handle", str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", stale)
        said = one_line(run_recipe(train, "--steps", 5, code=1))
    assert "cannot be read here: Stale file handle" in said
    assert steps(run_recipe.dir) == [2, 4]
    run_recipe(train, "--steps", 5)
    assert min(set(losses(run_recipe.dir)) - {1, 2, 3, 4}) == 5


def test_a_save_is_not_lost_because_older_ones_cannot_be_removed(run_recipe, monkeypatch):
    def unreadable(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.Store, "surplus", unreadable)
    with pytest.warns(UserWarning, match="older checkpoints were not removed: .*Input/output error"):
        said = save_always(run_recipe, "--steps", 4)
    assert "NOT SAVED" not in said
    assert steps(run_recipe.dir) == [2, 4]


def test_a_late_save_stands_for_the_multiple_that_it_missed():
    assert Retention(1, 100).kept([90, 103, 110, 200, 210, 305, 320], {}) == {103, 200, 305, 320}


def test_values_that_are_nested_absurdly_are_refused_in_a_line(run_recipe):
    run_recipe(tracking(Plain(x=1)), "--steps", 2)
    index = run_recipe.dir / "checkpoints/step-00000002/index.json"
    body = json.loads(index.read_bytes())["index"]
    nested: object = 1
    for _ in range(900):
        nested = [nested]
    body["values"]["track/it"] = {"x": nested}
    rewrite(index.parent, body)
    said = one_line(run_recipe(tracking(Plain(x=1)), "--steps", 3, code=1))
    assert "step-00000002" in said
    assert steps(run_recipe.dir) == [2]
