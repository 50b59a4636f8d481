"""The exception types for what a user can put right."""


class GigabatchError(Exception):
    """A fault in the configuration, the data or the run folder.

    The message says what is wrong, where, why, and which key to set; the command line prints it
    without a traceback and exits with code 2.
    """


class BadSample(GigabatchError):
    """One sample whose bytes cannot be used: a run puts another in its place, and counts it."""
