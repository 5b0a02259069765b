"""The one error that a user can cause, and how several of its kind are told at once."""

import math
import re


class InputError(ValueError):
    """Input or options that cannot be used: names the file, row or option, and the remedy.

    Commands print the message without a traceback and end with status 1.

    Attributes
    ----------
    elsewhere
        True in a process that only hears of an error which another process met, and shows.
    """

    elsewhere = False


class Problems:
    """What is wrong with a user's options, one line each: option, value, remedy."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, line: str) -> None:
        self._lines.append(line)

    def require(self, good: bool, option: str, value: object, remedy: str) -> None:
        """Add a line unless it is good."""
        if not good:
            self.add(f"{option}={value}: {remedy}")

    def positive(self, option: str, value: float | None) -> None:
        """Require a finite number above 0, or none."""
        self.require(value is None or 0 < value < math.inf, option, value, "must be a positive number")

    def one_of(self, option: str, value: str, *allowed: str) -> None:
        self.require(value in allowed, option, value, f"must be one of {', '.join(allowed)}")

    def folder_name(self, option: str, name: str | None) -> None:
        """Require what names a folder, and nothing above or below it, or none."""
        self.require(
            name is None or re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name) is not None,
            option, name, "must be a plain folder name of letters, digits, '_', '.', '+' and '-'",
        )  # fmt: skip

    def tell(self) -> None:
        """Raise InputError with all lines, if there are any."""
        if self._lines:
            raise InputError("\n".join(self._lines))
