"""What kind a failure is: whether the same job may go better when it is tried again."""

import errno

import pytest
import torch
import torch.distributed as dist

from launcher.errors import CheckpointError, LauncherError, NumbersError, UsageError, WorldError
from launcher.failure import kind_of, kind_of_text, may_pass


def noted(error):
    error.add_note("(launcher: sample 3 of loader 'a')")
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x4)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("unknown error"),  # nobody says of what
        KeyError("Connection reset by peer"),  # no connection's error, whatever it holds
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        PermissionError(errno.EACCES, "Permission denied"),
        AssertionError(),
        LauncherError("loss is no sum"),
        UsageError("--lr"),
    ],
)
def test_code(error):
    assert kind_of(error) == "code"
    assert not may_pass("code")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms"),
        RuntimeError("Gloo: Application timeout\ncaused pair.cc:1"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error"),
        dist.DistStoreError("wait timeout after 300000ms, keys: /worker/0"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
    ],
)
def test_peer(error):
    assert kind_of(error) == "peer"
    assert may_pass("peer")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"),
        RuntimeError("CUDA error: unknown error"),
        RuntimeError("CUDA error: all CUDA-capable devices are busy: device(s) is busy or unavailable"),
        RuntimeError("No CUDA GPUs: CUDA error: no CUDA-capable device is detected"),
        RuntimeError("NCCL Error 2: unhandled system error (run with NCCL_DEBUG=INFO for details)"),
        RuntimeError("NVML: GPU is lost"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
    ],
)
def test_hardware(error):
    assert kind_of(error) == "hardware"
    assert may_pass("hardware")


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("memory", RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")),
        ("memory", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")),
        ("memory", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        ("memory", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")),
        ("memory", MemoryError()),
        ("memory", OSError(errno.ENOMEM, "Cannot allocate memory")),
        ("disk", OSError(errno.ENOSPC, "No space left on device")),
        ("disk", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ("disk", OSError(errno.EROFS, "Read-only file system")),
        ("disk", OSError("Caught OSError in DataLoader worker 0.\nOSError: [Errno 28] No space left on device")),
        ("disk", RuntimeError("CppCompileError: C++ compile error\n/tmp/x.s: fatal error: No space left on device")),
        ("data", RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")),
        ("data", RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly")),
        ("data", noted(KeyError("label"))),
        ("data", ValueError("Caught ValueError in DataLoader worker process 0.\n(launcher: sample 3 of loader 'a')")),
        ("memory", noted(MemoryError())),
        ("hardware", noted(OSError(errno.EIO, "Input/output error"))),
        ("network", noted(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))),
        ("network", noted(TimeoutError("the read timed out"))),
        ("numbers", NumbersError("nan")),
    ],
)
def test_other_kinds(kind, error):
    assert kind_of(error) == kind
    assert may_pass(kind) == (kind in ("hardware", "network"))


def test_of_a_death_in_native_code():
    assert kind_of_text("terminate called after throwing an instance of 'std::bad_alloc'") == "memory"
    assert kind_of_text("op.preamble.length <= op.nbytes. 8 vs 4. ... a distributed collective mismatch") == "code"
    assert kind_of_text("Fatal Python error: Segmentation fault") == "killed"


def test_an_unknown_kind_is_not_tried_again():
    assert not may_pass("something new")


def caught(build):
    try:
        build()
    except Exception as error:
        return error
    raise AssertionError


def test_what_it_comes_from_counts():
    def from_disk():
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError as error:
            raise CheckpointError("cannot write the checkpoint") from error

    def without_a_word():
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            raise CheckpointError("cannot write the checkpoint") from None

    def from_a_peer():
        try:
            raise RuntimeError("Connection closed by peer [10.0.0.1]:3")
        except RuntimeError as error:
            raise WorldError("rank 3 is gone") from error

    assert kind_of(caught(from_disk)) == kind_of(caught(without_a_word)) == "hardware"
    assert kind_of(caught(from_a_peer)) == "peer"


def test_our_own_words_are_not_taken_for_anothers():
    assert kind_of(LauncherError("NCCL: connection refused, CUDA unknown error")) == "code"


def test_a_ring_of_causes_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert kind_of(first) == "code"
