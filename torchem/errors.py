"""The one error that a user can cause."""


class InputError(ValueError):
    """Input or options that cannot be used: names the file, row or option, and the remedy.

    Commands print the message without a traceback and end with status 1.

    Attributes
    ----------
    elsewhere
        True in a process that only hears of an error which another process met, and shows.
    """

    elsewhere = False
