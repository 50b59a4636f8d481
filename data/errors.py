"""Exception types for errors that a user can fix."""


class GigabatchError(Exception):
    """An error in the configuration, the data or the run folder.

    The message says what is wrong, where, why, and which key or command fixes it. The command line
    prints it without a traceback and exits with code 2.
    """


class BadSample(GigabatchError):
    """Raised for a sample that cannot be used. A run substitutes another sample and records it."""
