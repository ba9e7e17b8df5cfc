"""On the PYTHONPATH of processes that tests start: no garbage is collected while they import libraries, a fifth of that time, nor
at their end, where it takes a second and more."""

import atexit
import gc

gc.set_threshold(100_000, 20, 100)
atexit.register(gc.freeze)
