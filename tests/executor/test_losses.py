"""Lost peers (NCCL) and a lost GPU (Metal), by what the libraries really print; and what only looks like it."""

from collections.abc import Sequence
from typing import Any

import pytest

from app.domain.enums import EndReason
from app.executor.attempts.classification import classify
from tests.executor.test_results import TRACEBACK, ended

ABORTED: dict[str, Any] = {"code": None, "signal": 6}
FRAMES = [f"frame #{number}: c10d::ProcessGroupNCCL::ncclCommWatchdog() + 0x1a" for number in range(12)]
WATCHDOG = (
    "[rank1]:[E1125 16:00:00.123456789 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=41, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600029 "
    "milliseconds before timing out."
)
WHAT = "  what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception: x"


@pytest.mark.parametrize(
    ("lines", "exit_record", "reason"),
    [
        (
            [
                *TRACEBACK,
                "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/"
                "ProcessGroupNCCL.cpp:3356, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL "
                "version 2.27.3",
                "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
                "Last error:",
                "socketPollConnect: connect to 10.0.0.2<41123> returned Connection refused",
            ],
            {"code": 1},
            EndReason.NCCL_ERROR,
        ),
        ([*TRACEBACK, "RuntimeError: NCCL communicator was aborted on rank 1."], {"code": 1}, EndReason.NCCL_ERROR),
        (
            [
                WATCHDOG,
                "terminate called after throwing an instance of 'c10::DistBackendError'",
                WHAT,
                *FRAMES,
            ],
            ABORTED,
            EndReason.NCCL_ERROR,
        ),
        (
            [
                *TRACEBACK,
                "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled cuda error",
                "ncclUnhandledCudaError: Call to CUDA function failed.",
                "Last error:",
                "Cuda failure 2 'out of memory'",
            ],
            {"code": 1},
            EndReason.CUDA_OUT_OF_MEMORY,
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", WATCHDOG, WHAT, *FRAMES],
            ABORTED,
            EndReason.CUDA_OUT_OF_MEMORY,
        ),
        (
            [
                "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer "
                "execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
            ],
            ABORTED,
            EndReason.METAL_WATCHDOG,
        ),
        (
            [
                *TRACEBACK,
                "RuntimeError: [METAL] Command buffer execution failed: Impacting Interactivity "
                "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
            ],
            {"code": 1},
            EndReason.METAL_WATCHDOG,
        ),
        (
            [
                "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer "
                "execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            ],
            ABORTED,
            EndReason.CUDA_OUT_OF_MEMORY,
        ),
        (
            [
                *TRACEBACK,
                "RuntimeError: [metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum",
            ],
            {"code": 1},
            EndReason.CUDA_OUT_OF_MEMORY,
        ),
        (
            [*TRACEBACK, "RuntimeError: [malloc] Unable to allocate 99 bytes."],
            {"code": 1},
            EndReason.OUT_OF_MEMORY,
        ),
        # said and survived: the exception that ended the script is another
        ([WATCHDOG, *TRACEBACK, "ValueError: other"], {"code": 1}, EndReason.EXIT_CODE),
        # words about NCCL are no failure of it
        (
            ["NCCL version 2.27.3+cuda12.9", "[rank0]: using NCCL_DEBUG=INFO, NCCL error handling is async"],
            {"code": 3},
            EndReason.EXIT_CODE,
        ),
        # long ago, and much was printed since
        ([WATCHDOG, *["step 4"] * 50], {"code": None, "signal": 11}, EndReason.SIGNAL),
    ],
)
def test_reason(lines: Sequence[str], exit_record: dict[str, Any], reason: EndReason) -> None:
    assert classify(ended(**exit_record), lines).reason is reason


@pytest.mark.parametrize("reason", ["timed_out", "stalled"])
def test_attempt_stopped_by_a_limit_ends_with_its_reason(reason: str) -> None:
    failure = classify(ended(why="stopped", code=143, stop_reason=reason), ["step 4"])

    assert (failure.reason, failure.detail) == (EndReason(reason), "step 4")
