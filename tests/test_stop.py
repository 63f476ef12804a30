"""Stop requests by signals. Interrupted loops and the time limit: test_recovery.py."""

import signal

import pytest

from utils.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_requests_a_stop_and_the_handlers_are_restored(number, capfd):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(number)
        signal.raise_signal(number)  # at once: torchrun and queues send several
        assert stop and stop.signals == 2 and signal.Signals(number).name in stop.reason
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert capfd.readouterr().err.count("Stopping") == 1
