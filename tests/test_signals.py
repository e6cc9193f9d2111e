"""Signals are seen at once, whatever the main thread does, and never twice."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import launcher
from launcher.signals import Signals


def seen(signals):
    deadline = time.monotonic() + 5
    while signals.stop is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return signals.stop


def test_the_first_signal_is_named_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
    signals = Signals(lambda name: None, lambda name: None)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert seen(signals) == "SIGUSR2"
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen(signals) == "SIGUSR2"
    finally:
        signals.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)] == before
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_after_a_failure_control_c_is_the_debuggers(run_recipe):
    """As in a notebook or in pdb: who looks at a run that has failed can interrupt what they do there."""

    def train(run: launcher.Run) -> None:
        raise ZeroDivisionError("the recipe's own")

    with pytest.raises(ZeroDivisionError):
        run_recipe(train)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_flag_rises_while_the_main_thread_sits_in_c():
    """A matrix product of a second: a Python handler would run after it."""
    script = """
        import os, signal, subprocess, sys, threading, time, torch
        from launcher.signals import Signals
        signals = Signals(lambda name: None, lambda name: None)
        a = torch.randn(1500, 1500)
        seen = []
        def watch():
            start = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            while signals.stop is None:
                time.sleep(0.001)
            seen.append(time.monotonic() - start)
        threading.Thread(target=watch).start()
        child = subprocess.Popen(["sleep", "60"])
        start = time.monotonic()
        while time.monotonic() - start < 1:
            torch.linalg.matrix_power(a, 50)
        child.send_signal(signal.SIGUSR2)
        time.sleep(0.1)
        print(len(seen), child.poll())
        child.kill()
        child.wait()
        signals.close()
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["1", "None"], result.stdout + result.stderr
