"""On the PYTHONPATH of processes that tests start: garbage is collected seldom, since it takes a fifth of the time of importing
libraries, and not at the end, where it takes a second and more."""

import atexit
import gc

gc.set_threshold(100_000, 20, 100)
atexit.register(gc.freeze)
