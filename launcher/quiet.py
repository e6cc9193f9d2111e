"""Runs a Python script with what it says on sys.stderr kept in a file: `python -P quiet.py DIRECTORY SCRIPT ARGS...`.

For the agent of `accelerate launch`, whose warnings and tracebacks of its own would bury what its ranks tell. They are
processes of their own, and inherit the terminal: only this process's Python writes to DIRECTORY/agent.txt. Its
temporary files are there too; torch's agent leaves them behind.
"""

import os
import runpy
import sys
import tempfile

__all__: list[str] = []

if __name__ == "__main__":
    _, tempfile.tempdir, *sys.argv = sys.argv
    file = os.path.join(tempfile.tempdir, "agent.txt")
    sys.stderr = open(file, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - to the end
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
