"""Whether this process was asked to stop: set by its signal handlers, read by the thread that watches the launcher."""

import threading

_asked = threading.Event()


def note_stop() -> None:
    _asked.set()


def stop_requested() -> bool:
    return _asked.is_set()
