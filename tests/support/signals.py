"""What a process that tests stop must not inherit from them."""

from __future__ import annotations

import signal


def as_in_a_terminal() -> None:
    """Let SIGINT and SIGTERM end this process again: tests started by nohup may ignore them.

    For a new process, before it does anything else.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # after exec: the default action
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
