"""Signals that ask a run to stop, in one process; what several processes agree on is in test_checkpoint_hosts.py."""

import os
import signal

import pytest

from nanochat_jax.mesh.preemption import Stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_noted_by_its_name_and_its_handler_given_back(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.agreed() == (False, False) and stop.agreed(True) == (False, True)
        os.kill(os.getpid(), number)
        assert stop.requested and stop.signal == stop.why == name
        assert stop.agreed() == (True, False) and stop.agreed(True) == (True, True)
    assert signal.getsignal(number) is before


def test_the_first_signal_is_the_reason_and_the_second_ctrl_c_interrupts():
    with Stop() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.signal == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_handler_that_python_did_not_set_becomes_the_default(monkeypatch):
    """jax.distributed takes SIGTERM in C++, where Python can neither see nor restore it."""
    before = signal.getsignal(signal.SIGTERM)
    take = signal.signal
    monkeypatch.setattr(signal, "signal", lambda s, h: (take(s, h), None)[1])
    stop = Stop().__enter__()
    monkeypatch.setattr(signal, "signal", take)
    stop.__exit__(None, None, None)
    try:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
