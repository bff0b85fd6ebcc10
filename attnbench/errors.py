"""The one exception that a person at the terminal is meant to read."""


class Refusal(Exception):
    """Bad input: a single line that names the cause and the way out; commands end with exit status 2."""
