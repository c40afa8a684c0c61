"""One thing to try on this machine, and what came of it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass


class UnavailableError(RuntimeError):
    """Something does not work here, for a known reason."""


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    group: str
    name: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Check:
    """One thing to try. The probe returns a line about what works, or raises what is wrong."""

    group: str
    name: str
    probe: Callable[[], str]

    def run(self) -> Finding:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return Finding(self.group, self.name, True, self.probe())
        except Exception as error:  # anything: `import transformer_engine` raises RuntimeError without CUDA's libraries
            return Finding(self.group, self.name, False, reason(error))


def reason(error: BaseException) -> str:
    """One line of at most 300 characters; a known reason speaks for itself, other errors with their type."""
    message = " ".join(str(error).split())
    if not isinstance(error, UnavailableError):
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message if len(message) <= 300 else f"{message[:297]}..."
