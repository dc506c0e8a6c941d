"""Many threads on one model: the state of a pass travels with the pass, or belongs to the thread that runs it.

A plan goes into the model as an argument, or on the cache of the pass; a hook that has to remember something between
two modules of one layer keeps it per thread. So nothing is locked, and passes of several threads run side by side.
"""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """State that every thread has of its own; the copies of an object share it, as they share the threads."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return self
