"""Stopping a run: signals and the time limit set one flag, `stop`; every long loop runs over `interruptible(items)`."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # from a queue, from Ctrl-C, from a terminal that closes


class Interrupted(Exception):
    """A stop was requested in the middle of work that is repeated when the run resumes."""


class StopRequest:
    """True once the time limit has passed, or one of SIGNALS arrived while `with stop:` handles them."""

    reason, signals, _start, _deadline = "", 0, time.monotonic(), math.inf

    def set_time_limit(self, minutes: float) -> None:
        """Request a stop this many minutes after the program started; 0: never."""
        self._deadline = self._start + 60 * (minutes or math.inf)

    def __enter__(self) -> "StopRequest":
        self.reason, self.signals = "", 0
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS
                          if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores it
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.reason, self._deadline = "", math.inf  # a later run in the same process starts afresh

    def _handle(self, number: int, _frame: object) -> None:
        self.signals += 1
        if self.signals == 1:
            self._first = time.monotonic()
            self.reason = self.reason or f"received {signal.Signals(number).name}"
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):  # print is not reentrant, and a handler may interrupt it
                    os.write(2, b"\nStopping once the state is saved. To stop at once, without what was trained since "
                             b"the last save: Ctrl-C (or the signal) again.\n")
        elif time.monotonic() > self._first + 1:  # not those that torchrun and queues send at once
            raise KeyboardInterrupt

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "opt.max_minutes has passed"
        return bool(self.reason)


stop = StopRequest()  # signals reach the process as a whole, so it has one


def interruptible(items: Iterable) -> Iterator:
    """Yield the same items; raise Interrupted in place of the next one once a stop is requested."""
    for item in items:
        if stop:
            raise Interrupted
        yield item


def exit_with(status: int) -> None:
    """End the program with this status, whatever signals still arrive."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
