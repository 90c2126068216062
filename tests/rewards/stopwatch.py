"""Time as a deadline counts it on a machine that has other things to do."""

import threading
import time


class Stopwatch:
    """Runs from its making; a thread of its own notices how long nobody got a turn.

    Tests run beside each other. What another process takes from this one is not what a deadline is about.
    """

    def __init__(self) -> None:
        self._start, self._lost, self._stopped = time.monotonic(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            before = time.monotonic()
            self._stopped.wait(0.01)
            self._lost += max(0.0, time.monotonic() - before - 0.02)

    def stop(self) -> float:
        """Seconds so far, without those in which even a thread that only sleeps was late."""
        took = time.monotonic() - self._start
        self._stopped.set()
        self._thread.join()
        return took - self._lost
