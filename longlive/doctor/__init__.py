"""`longlive doctor`: what works on this machine, and why the rest does not."""

from longlive.doctor.check import Check, Finding, UnavailableError
from longlive.doctor.report import checks, main, report

__all__ = ["Check", "Finding", "UnavailableError", "checks", "main", "report"]
