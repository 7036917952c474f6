"""The errors that a user sees: one line that says what happened, what was expected, and what to do next."""


class SepconvertError(Exception):
    """Bad usage or bad input. The command line prints the message and exits with `exit_code`."""

    exit_code = 2


class DemandNotMetError(SepconvertError):
    """A demanded budget or the verification of the result was not met."""

    exit_code = 3
