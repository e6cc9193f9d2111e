"""`launcher.main`: from a recipe's `train` to a run, and from whatever ends it to a status and an exit code."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from launcher.caches import Caches, check_choice, open_caches
from launcher.config import RunConfig, check_resume, parse, resolve, to_dict
from launcher.errors import LauncherError, RecipeError, UsageError
from launcher.failure import Kind, kind_of, may_pass
from launcher.flight import collectives
from launcher.output import Output, log_path
from launcher.rehearse import answer
from launcher.rundir import RunDir, Status
from launcher.seeds import seed_microbatch, step_state
from launcher.show import printable
from launcher.signals import Signals, Stopped
from launcher.startup import Startup
from launcher.verdict import judged, of_one
from launcher.watchdog import Watchdog
from launcher.witness import PARENT, about, recipes_part, told_to_agent, told_to_parent, whereabouts, witness
from launcher.world import World, connect, disconnect

if TYPE_CHECKING:
    from launcher.hang import Judgement
    from launcher.run import Run

__all__ = ["Attempt", "conduct", "main"]

C = TypeVar("C")


def main(train: Callable[[Run, C], None] | Callable[[Run], None]) -> None:
    """Run a recipe as the command line and the environment say; the last line of its file.

    `train(run, cfg)` is annotated with the dataclass of the recipe's options, from which the command line is made;
    `train(run)` has none. A finished run returns, in a single process, or exits with 0; one that was stopped and saved
    exits with 0, a usage error with 2, any other failure with 1. In a single process an exception of the recipe's own
    passes through, so that a debugger finds it.
    """
    conduct(Attempt(), train)


def conduct(attempt: Attempt, train: Callable[..., None]) -> None:
    """`main`, with an attempt that is given."""
    try:
        attempt.start(train)
        attempt.train()
    except LauncherError as error:
        attempt.leave(attempt.fail(error))
    except Stopped:
        attempt.leave(attempt.stop())
    except SystemExit as exit_:
        if attempt.run is None:  # --help
            raise
        attempt.leave(
            attempt.fail(RecipeError(f"the recipe left by itself, with {exit_.code!r}: return from train instead"))
        )
    except Exception as error:
        code = attempt.fail(error)
        if attempt.world.world_size == 1:
            attempt.let_pass(error)
            raise
        attempt.leave(code)
    if attempt.world.group is not None:
        attempt.leave(0)
    attempt.close()


class Attempt:
    """One start of a run, from the command line to its end."""

    def __init__(self, make_run: Callable[..., Run] | None = None) -> None:
        """`make_run` makes the run; None: `Run` does."""
        self._make_run = make_run
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.world = World(rank=rank, world_size=world_size)  # as announced; the real one once connected
        self.rundir: RunDir | None = None
        self.number = 0
        self.run: Run | None = None
        self.signals: Signals | None = None
        self.output: Output | None = None
        self.startup = Startup()
        self.caches: Caches | None = None
        self._parent = os.environ.pop(PARENT, None)  # not for what the recipe may start
        self._settled = threading.Event()
        """Set once the ranks have agreed how this ends: nothing leaves at once any more."""
        self._ending = threading.Lock()
        self._watchdog: Watchdog | None = None
        self._watched = False
        """Whether a hang may still end this process: not once it has done its work, or tells of a failure."""

    def start(self, train: Callable[..., None]) -> None:
        """Read the options, join the other ranks, open the run directory."""
        config_type = _config_type(train)
        module = sys.modules.get(getattr(train, "func", train).__module__)
        recipe = Path(getattr(module, "__file__", None) or sys.argv[0])
        description = getattr(module, "__doc__", None)
        if asked := os.environ.get("LAUNCHER_REHEARSE"):
            answer(Path(asked), config_type, prog=recipe.name, description=description)
            raise SystemExit(0)
        self.startup.enter("options")
        config, options = parse(config_type, sys.argv[1:], prog=recipe.name, description=description)
        options = resolve(options, os.environ)
        _check_trackers(options)
        check_choice(options.cache)
        self.signals = Signals(self.signalled, self.signalled_again)
        _set_up_torch(options)
        self.startup.enter("rendezvous")
        with self.startup.during("imports"):
            import accelerate  # noqa: F401 - connect does

            from launcher.run import Run
        self.world, accelerator = connect(options, os.environ)
        settings = to_dict(config, options)
        self.startup.enter("run directory")
        self.rundir, self.number, token = self._open(options, settings, recipe)
        self._introduce()
        with self.startup.during("compile cache"):
            runs, is_main = self.rundir.path.parent, self.world.is_main
            self.caches = open_caches(options.cache, runs, recipe.stem, token, self._warn, is_main=is_main)
        if self.caches is not None and options.compile != "off":
            with self.startup.during("compile"):  # it imports the compiler
                self.caches.set_up_compiler()
        make_run = self._make_run or Run
        self.run = make_run(options, settings, self.world, accelerator, self.rundir, self.number, self.signals)
        self.run.startup, self.run.caches = self.startup, self.caches
        self._watched = True
        self._watchdog = Watchdog(self.run, self.rundir, self.number, self.hung)
        arguments = (self.run,) if config_type is None else (self.run, config)
        self._train: Callable[[], None] = lambda: train(*arguments)

    def train(self) -> None:
        """Run the recipe to its end, and save what it has learnt."""
        assert self.run is not None
        self.run.check_stop()
        self.startup.enter("data")
        seed_microbatch(step_state(self.run.seed, -1), 0, self.run.device)  # what a recipe draws before its steps
        self._train()
        self._settle()
        self.run.returned()
        self._unwatch()
        self._status("finished")
        self._record_exit("finished")

    def stop(self) -> int:
        """All ranks stopped at one step: save there; the exit code."""
        assert self.run is not None
        assert self.rundir is not None
        assert self.signals is not None
        self._settle()
        try:
            self.run.stopped()
        except LauncherError as error:
            return self.fail(error)
        self._unwatch()
        status: Status = "cancelled" if self.rundir.is_cancelled else "preempted"
        reason = self.signals.stop or "another rank"
        self._status(status)
        self._record_exit(status, reason)
        self.run.print(f"stopped at step {self.run.completed} ({reason}); run it again to go on")
        return 0

    def fail(self, error: Exception) -> int:
        """Record the failure; the first rank that fails tells it, the others only that they ended; the exit code."""
        self._unwatch()
        self._settle()
        kind, code = kind_of(error), error.exit_code if isinstance(error, LauncherError) else 1
        if kind == "peer" and self.rundir is not None and self.rundir.left(self.number, "preempted"):
            self._status("preempted")  # a signal that only some have seen yet, before the first step
            self._record_exit("preempted", "another rank has left at once")
            return 0
        if self.rundir is None:
            self._refuse(error)
            return code
        step = self.run.completed if self.run is not None else None
        told, now = f"{type(error).__name__}: {error}", time.time()
        first = self.rundir.failed(
            self.number, rank=self.world.rank, step=step, error=told, kind=kind, retry=may_pass(kind)
        )
        self._status("failed", everyone=first)
        self._record_exit("failed", told)
        self._testify(error, kind, step, failed_at=now if first else None)
        return code

    def _testify(self, error: Exception, kind: Kind, step: int | None, *, failed_at: float | None) -> None:
        """Tell of the failure: to the verdict all there is, to the person the first one's, and once."""
        assert self.rundir is not None
        called = collectives() if kind == "peer" and self.world.group is not None else None
        facts = witness(error, kind, world=self.world, step=step, called=called)
        with suppress(LauncherError):  # a full disk: then the parent has it alone
            self.rundir.record_error(self.number, self.world.rank, facts)
        told_to_parent(self._parent, f"error-{self.world.rank:05d}.json", facts)
        alone = self.world.world_size == 1
        where = "" if alone else f" rank {self.world.rank}:"
        frames = f"{facts['traceback']}"
        if isinstance(error, LauncherError):
            said = f"launcher:{where} {printable(str(error))}\n"
        elif kind == "peer" and not alone:
            said = f"launcher:{where} has lost its peer: {printable(facts['message'])}\n"
            self._note(frames)
        else:
            said = f"launcher:{where} the recipe failed\n{frames}"
        if alone and not isinstance(error, LauncherError):
            self._note(frames)  # it passes through, and Python shows it
        elif failed_at is not None:
            self._say(said)
        else:
            self._note(said)
        if not alone:
            told_to_agent(of_one(facts, self.world.world_size).text, failed_at=failed_at)

    def _refuse(self, error: Exception) -> None:
        """Tell of a failure before there is a run directory."""
        usage = isinstance(error, LauncherError) and error.exit_code == 2
        if usage:
            _refused(str(error))
        if isinstance(error, LauncherError):
            if self.world.is_main or not usage:  # a wrong option is wrong on every rank
                print(f"launcher: {printable(str(error))}", file=sys.stderr, flush=True)
        elif self.world.world_size > 1:
            print("launcher: the recipe failed", file=sys.stderr)
            traceback.print_exception(type(error), error, recipes_part(error.__traceback__), file=sys.stderr)

    def let_pass(self, error: Exception) -> None:
        """An exception leaves this process, as a debugger wants it; who sees its traceback sees the verdict below."""
        if self.run is not None:
            self.run.saver.close()
        if self.signals is not None:
            self.signals.close()  # Ctrl-C is the debugger's now
        if self.output is not None:
            self.output.close()
        if self.rundir is not None:
            _ends_with(error, self.rundir.path if self._parent is None else None, self.number)

    def _introduce(self) -> None:
        """The run directory is there: write down what this rank is, and keep what it prints."""
        assert self.rundir is not None
        world, path = self.world, self.rundir.path
        with suppress(LauncherError):
            self.rundir.record_rank(self.number, world.rank, about(world))
        if world.is_main:
            told_to_parent(self._parent, "run", {"path": str(path), "attempt": self.number})
        if "LAUNCHER_RUN" not in os.environ:
            told = f"attempt {self.number} rank {world.rank} of {world.world_size} on {socket.gethostname()}"
            with suppress(OSError):  # a full disk is a save's to tell
                self.output = Output(log_path(path, world.rank), told, shown=world.is_main)

    def _say(self, text: str) -> None:
        """Show the person something; in many processes of `launcher run` their parent does, in the end."""
        if self._parent is not None and self.world.world_size > 1 and self.output is not None:
            self.output.note(text)
        elif self.output is not None:
            self.output.show(text)
        else:
            sys.stderr.write(text)
            sys.stderr.flush()

    def _warn(self, line: str) -> None:
        print(f"launcher: {line}", file=sys.stderr, flush=True)

    def _note(self, text: str) -> None:
        if self.output is not None:
            self.output.note(text)

    def signalled(self, name: str) -> None:
        """The first stop signal has come, in the thread that watches for them.

        Before this start's first step there is nothing to save, and what a peer's failure has ended has no edge to
        come: leave at once. Else the ranks agree at the next edge, which is waited for only so long: a rank that hangs
        must not keep the others from saying how they ended.
        """
        if self.rundir is not None:
            with suppress(LauncherError):
                self.rundir.record_signal(self.number, rank=self.world.rank, name=name)
            if self.rundir.failure(self.number) is not None:
                self._leave_now("failed", f"{name}, after another rank had failed", 1)
        if self.run is None or not self.run.stepped:
            self._leave_now("preempted", f"{name} before the first step", 0)
            return
        patience = self.run.clock.patience
        threading.Thread(target=self._wait_for_edge, args=(name, patience), name="launcher-edge", daemon=True).start()

    def signalled_again(self, name: str) -> None:
        """A second Ctrl-C, or a second signal of its kind: leave without a save, unless that is being written."""
        self._leave_now("cancelled" if name == "SIGINT" else "preempted", f"a second {name}", 130)

    def hung(self, found: Judgement) -> None:
        """The run makes no progress, says the watching thread: mark it failed and end the process, without a save."""
        with self._ending:
            if not self._watched or self.run is None or self.rundir is None:
                return
            now = time.time()
            told = f"{found.sentence}; every rank's stacks are in attempts/{self.number}/stacks-*.txt"
            first = self.rundir.failed(
                self.number, rank=found.rank, step=found.step, error=told, kind="hang", retry=may_pass("hang")
            )
            with suppress(LauncherError):
                self._status("failed", everyone=first)
            self._record_exit("failed", "the run hangs")
            if first:
                self._say(f"launcher: the run hangs: {printable(told)}\n")
            told_to_agent(f"the run hangs: {told}", failed_at=now if first else None)
            for child in multiprocessing.active_children():  # a worker that is stuck would outlive this process
                child.kill()
            self.run.saver.close()
            os._exit(1)

    def _unwatch(self) -> None:
        with self._ending:
            self._watched = False
        if self._watchdog is not None:
            self._watchdog.stop()

    def _wait_for_edge(self, name: str, patience: float) -> None:
        if not self._settled.wait(patience):
            self._leave_now("preempted", f"{name}, and no step's edge came in {patience:.0f} s", 1)

    def _settle(self) -> None:
        with self._ending:
            self._settled.set()

    def _leave_now(self, status: Status, reason: str, code: int) -> None:
        """End the process from the thread that watches for signals, without a save."""
        with self._ending:
            if self._settled.is_set():
                return
            if status == "preempted" and self.rundir is not None and self.rundir.is_cancelled:
                status = "cancelled"
            with suppress(LauncherError):
                self._status(status)
            stood = status == "failed" and self.world.group is not None
            self._record_exit(status, reason, **(whereabouts(collectives()) if stood else {}))
            said = f"launcher: left at once, without a save: {reason}\n"
            if status == "failed":
                self._note(said)  # the person hears of the failure itself
            elif self.world.is_main:
                print(said, end="", file=sys.stderr, flush=True)
            os._exit(code)

    def _record_exit(self, status: Status, reason: str = "", **more: Any) -> None:
        if self.rundir is not None:
            step = None if self.run is None else self.run.completed
            with suppress(LauncherError):
                rank = self.world.rank
                self.rundir.record_exit(self.number, rank=rank, status=status, step=step, reason=reason, **more)

    def leave(self, code: int) -> None:
        """End the process with `code`.

        With peers at once: a process group's threads have been seen to abort in the interpreter's teardown, after
        complete results, and the exit code must not say that the run failed.
        """
        self.close()
        if self.world.group is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    def close(self) -> None:
        """Let go of everything; the status has been written before."""
        if self.run is not None:
            self.run.close()
        if self.caches is not None:
            self.caches.close()
        if self.world.group is None:
            disconnect()
        if self.signals is not None:
            self.signals.close()
        if self.output is not None:
            self.output.close()

    def _open(self, options: RunConfig, settings: Mapping[str, Any], recipe: Path) -> tuple[RunDir, int, str]:
        """The run directory, this attempt's number and a name that no other start has, as rank 0 makes them."""
        hosts = sorted(set(self.world.gather(socket.gethostname())))
        opened: tuple[Path, int, str] | LauncherError | None = None
        if self.world.is_main:
            try:
                opened = (*_open_run(options, settings, recipe, self.world, hosts), secrets.token_hex(8))
            except LauncherError as error:
                opened = error
        opened = self.world.broadcast(opened)
        if isinstance(opened, LauncherError):
            raise opened
        assert opened is not None
        path, number, token = opened
        return RunDir(path, number), number, token

    def _status(self, status: Status, *, everyone: bool = False) -> None:
        if self.rundir is not None and (self.world.is_main or everyone):
            step = {} if self.run is None else {"global_step": self.run.completed}
            self.rundir.update(status=status, **step)


def _refused(why: str) -> None:
    """Tell the batch script, if there is one, that no start of this run can go better."""
    if run := os.environ.get("LAUNCHER_RUN"):
        with suppress(OSError):
            Path(run, "slurm", "refused").write_text(f"{printable(why)}\n")


def _check_trackers(options: RunConfig) -> None:
    modules = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in options.tracker:
        if not any(find_spec(module) for module in modules[name]):
            raise UsageError(f"--run.tracker {name}: it is not installed: pip install {name}")


def _ends_with(error: Exception, run: Path | None, attempt: int) -> None:
    """If it is this exception that ends the process, have the verdict on `run` printed below its traceback."""
    before = sys.excepthook

    def hook(type_: type[BaseException], value: BaseException, frames: TracebackType | None) -> None:
        sys.excepthook = before
        before(type_, value, frames)
        if value is not error:
            return
        if run is not None:
            print(f"launcher: {judged(run, attempt).text}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise, wherever Python then is
        for child in multiprocessing.active_children():  # its frames hold data workers, and Python would wait for them
            if child.daemon:
                child.kill()

    sys.excepthook = hook


def _open_run(
    options: RunConfig, settings: Mapping[str, Any], recipe: Path, world: World, hosts: Sequence[str]
) -> tuple[Path, int]:
    rundir = RunDir.open(options.dir, name=options.name or recipe.stem)
    saved = rundir.config()
    check_resume(settings if saved is None else saved, settings, options.allow)
    if "LAUNCHER_RUN" not in os.environ:  # started by hand: what `launcher cancel` asked of a job is over
        (rundir.path / "slurm" / "cancelled").unlink(missing_ok=True)
    number = rundir.start_attempt(world.world_size)
    rundir.record(settings, recipe, command=sys.argv, attempt=number, world_size=world.world_size, hosts=hosts)
    print(f"run directory: {rundir.path}" + (f" (attempt {number})" if number > 1 else ""), file=sys.stderr, flush=True)
    return rundir.path, number


def _config_type(train: Callable[..., None]) -> type | None:
    """The dataclass that `train`'s second parameter is annotated with."""
    parameters = list(inspect.signature(train).parameters.values())
    if len(parameters) == 1:
        return None
    hint = parameters[1].annotation if len(parameters) == 2 else None
    if isinstance(hint, str):  # from __future__ import annotations: this one hint, in the recipe's own namespace
        namespace = getattr(inspect.unwrap(getattr(train, "func", train)), "__globals__", {})
        hint = _named(hint, namespace)
    if not isinstance(hint, type):
        raise RecipeError(
            "launcher.main(train): train takes (run, cfg: Config), with the dataclass of its options, or (run)"
        )
    return hint


def _named(name: str, namespace: Mapping[str, Any]) -> Any:
    """What a dotted name stands for in a module; None where it is none."""
    first, *rest = name.split(".")
    found = namespace.get(first)
    for part in rest:
        found = getattr(found, part, None)
    return found


def _set_up_torch(options: RunConfig) -> None:
    """Thread count, TF32 and determinism: all of them change sums, so none is left to chance."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked = os.environ.get("OMP_NUM_THREADS") if "TORCHELASTIC_RUN_ID" not in os.environ else None
    shared_out = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    threads = options.threads or (int(asked) if asked and asked.isdigit() else shared_out)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # where it is missing, Accelerate sets its own number
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = options.tf32
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
