"""attnbench: which attention buys the best likelihood and representation for its memory and time."""

import os

__version__ = "0.1.0"

SPIN = 3000
"""Turns that a thread of GNU's OpenMP waits for the others before it sleeps. It takes 300,000 by itself, which on two
cores of which one was busy made a training step about 20 times slower, and on two free cores no faster."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN))  # read when torch is first imported
