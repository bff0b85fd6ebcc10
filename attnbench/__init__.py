"""attnbench: which attention buys the best likelihood and representation for its memory and time."""

__version__ = "0.1.0"
