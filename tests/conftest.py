"""What all tests need."""

from __future__ import annotations

import signal

# A shell script's background jobs ignore SIGINT, and so would the commands that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
