"""One of the processes that score on this machine without Ray: forked by `nursery.py`, told which slices by `local.py`.

Reads slices from a socket -> gives None when it is ready, then their receipts, or the error that stopped one. When the
socket closes it finishes what it is at, and ends.
"""

import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection

from mmray.options import CALLS_PER_PROCESS
from mmray.score.worker import WatchedScorer
from mmray.slices import Slice


class LocalWorker:
    """A scorer at the end of a socket."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._turn = connection, threading.Lock()

    def serve(self) -> None:
        """Scores what it is sent, until the connection closes."""
        with suppress(EOFError, ConnectionResetError), ThreadPoolExecutor(CALLS_PER_PROCESS) as threads:
            try:
                arguments, more = self._connection.recv()
                scorer = WatchedScorer(*arguments, **more)
                self._say(None)
            except BaseException as error:
                self._say(error)
                return
            while True:
                threads.submit(self._score, scorer, self._connection.recv())

    def _score(self, scorer: WatchedScorer, piece: Slice) -> None:
        try:
            self._say(scorer.score(piece))
        except BaseException as error:  # whoever waits must hear of any
            self._say(error)

    def _say(self, message: object) -> None:
        what = message
        if isinstance(message, BaseException):  # goes as its words: what it carries may not travel
            what = type(message).__name__, str(message)
            traceback.print_exception(message)
        with self._turn, suppress(BrokenPipeError):  # nobody listens any more
            self._connection.send(what)


def main(connection: Connection) -> None:
    """Serves a connection."""
    LocalWorker(connection).serve()
