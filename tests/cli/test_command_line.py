"""How commands end."""

import os
import signal

import pytest

from chat_logits.cli.command_line import Stopped, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_known_though_a_library_has_made_an_interrupt_of_its_own(number):
    """As Ray does, which waits in C."""
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
    assert stopped.value.number == number
