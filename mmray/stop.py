"""How a long step is told to stop: Ctrl-C and SIGTERM once are a request, twice an order.

What is at work is finished first, after SIGTERM no longer than `GRACE_S`: whoever sends it kills soon after. Where
nothing could be finished, once is enough.
"""

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from mmray.errors import EnvironmentFaultError

GRACE_S = 20.0  # of the 30 that Kubernetes gives by default
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
NUDGE, NUDGE_S = signal.SIGURG, 0.2
"""A signal that says nothing, and how often it is sent after another. Of one that comes as the main thread is about to
wait for a lock, the handler runs with the next one only; that it came, Python writes to a descriptor at once."""
RESUMES = "what is done is kept, the same command continues"


class Stop:
    """A request to stop, which may come at any time."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self._signal: signal.Signals | None = None
        self._asked, self._turn, self._over = threading.Event(), threading.Lock(), False
        self._came, self.bell = socket.socketpair()
        self.bell.setblocking(False)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Is the handler of Ctrl-C, SIGTERM, and the alarm that comes after it."""
        if self._signal is not None:
            _raise(self._signal)
        self._signal = signal.Signals(number)
        if number == signal.SIGTERM:
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        self._asked.set()  # to call anything from here would be to call it in the middle of anything

    def wait(self) -> None:
        """Has what is at work finished once there is a request, and then sends the signal again."""
        with self._came:
            self._listen()
            self._pass_on()

    def _listen(self) -> None:
        """Returns when there is a request, or none will come."""
        while not self._asked.is_set():
            came = self._came.recv(1)  # nothing at the end
            while came and came[0] in SIGNALS and not self._asked.wait(NUDGE_S) and self._send(NUDGE):
                pass

    def _pass_on(self) -> None:
        if self._signal is None:
            return
        again = "; Ctrl-C again stops at once" if self._signal == signal.SIGINT else ""
        print(f"mmray: stopping when what is at work is done{again}", file=sys.stderr)
        finishing = threading.Thread(target=self._finish, daemon=True)
        finishing.start()
        finishing.join(NUDGE_S)
        while finishing.is_alive() and self._send(NUDGE):
            finishing.join(NUDGE_S)
        number = self._signal
        while self._send(number):
            number = NUDGE
            time.sleep(NUDGE_S)

    def _send(self, number: signal.Signals) -> bool:
        """Sends a signal to the main thread; False where it is over."""
        with self._turn:
            if not self._over:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            return not self._over

    def end(self) -> None:
        """Sends and takes no more."""
        with self._turn:
            self._over = True
        self._asked.set()
        self.bell.close()


@contextmanager
def stoppable(finish: Callable[[], None]) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM requests for the duration of a `with` block, if it is in the main thread.

    Args:
        finish: called in a thread once there is a request; lets nothing new begin, and returns when nothing is at work.

    Raises:
        KeyboardInterrupt: Ctrl-C was a request that has been met, or came twice.
        EnvironmentFaultError: so was SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = Stop(finish)
    threading.Thread(target=stop.wait, daemon=True).start()
    descriptor = signal.set_wakeup_fd(stop.bell.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop.on_signal) for number in SIGNALS}
    before[NUDGE] = signal.signal(NUDGE, lambda *_: None)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        stop.end()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def terminate(*_: Any) -> NoReturn:
    """Is the handler of SIGTERM where nothing could be finished."""
    _raise(signal.SIGTERM)


@contextmanager
def terminable(before: Any) -> Iterator[None]:
    """Makes SIGTERM heard where the main thread waits in Ray, for the duration of a `with` block in that thread.

    Of what a handler raises there, Ray lets through only what Ctrl-C raises: SIGTERM becomes one.

    Args:
        before: the handler that SIGTERM had before Ray set its own, which says nothing; it has it again afterwards, and
            meanwhile too, unless it is `terminate` or none.

    Raises:
        EnvironmentFaultError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = threading.Event()

    def as_ctrl_c(*_: object) -> None:
        told.set()
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, before if callable(before) and before is not terminate else as_ctrl_c)
    try:
        yield
    except KeyboardInterrupt:
        if told.is_set():
            _raise(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: signal.Signals) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt(RESUMES)
    raise EnvironmentFaultError(f"stopped by SIGTERM; {RESUMES}")
