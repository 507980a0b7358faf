"""Stopping a long step: once is a request, twice an order, and SIGTERM has a deadline."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

PROGRAM = """
import signal, sys, threading
from mmray import stop
from mmray.errors import EnvironmentFaultError
stop.GRACE_S = {grace_s}
try:
    with stop.stoppable({finish}):
        print("at work", flush=True)
        threading.Event().wait()
except KeyboardInterrupt:
    sys.exit(130)
except EnvironmentFaultError as error:
    print(error, file=sys.stderr)
    sys.exit(5)
"""
NEVER, AT_ONCE = "threading.Event().wait", "lambda: None"


@pytest.mark.parametrize(
    ("finish", "grace_s", "signals", "code"),
    [
        (AT_ONCE, 600, [signal.SIGINT], 130),
        (AT_ONCE, 600, [signal.SIGTERM], 5),
        (NEVER, 600, [signal.SIGINT, signal.SIGINT], 130),
        (NEVER, 600, [signal.SIGTERM, signal.SIGTERM], 5),
        (NEVER, 600, [signal.SIGINT, signal.SIGTERM], 130),
        (NEVER, 0.1, [signal.SIGTERM], 5),
    ],
)
def test_a_request_is_met_and_an_order_or_a_deadline_does_not_wait_for_it(
    finish: str, grace_s: float, signals: list[signal.Signals], code: int
) -> None:
    program = PROGRAM.format(finish=finish, grace_s=grace_s)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signals[0])
        assert process.stderr.readline().startswith("mmray: stopping when what is at work is done")
        for number in signals[1:]:
            process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait() == code, errors
        assert "Traceback" not in errors
        assert ("the same command continues" in errors) == (code == 5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 5)])
@pytest.mark.parametrize(("finish", "times"), [(AT_ONCE, 1), (NEVER, 2)])
def test_what_was_met_or_ordered_is_heard_whatever_the_main_thread_is_about_to_do(
    finish: str, times: int, number: int, code: int
) -> None:
    """Where nobody nudged it, one process in twelve, or in thirty-three, slept on until another signal came."""
    program = PROGRAM.format(finish=finish, grace_s=600)

    def ended(_: int) -> int:
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"at work\n"
            process.send_signal(number)  # now, that it comes before the thread has begun to wait
            if times == 2:
                process.stderr.readline()
                process.send_signal(number)
            try:
                return process.wait(30)
            finally:
                process.kill()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ended, range(60))) == {code}
