"""Every error meant for a user.

AdapterError            exit 1
  InvalidError               2   a reference, option or value that cannot be parsed
  NotFoundError              3   adapter, version, blob, kind, remote
  ConflictError              4   already exists with other content; diverged; locked
  DamagedError               5   digest mismatch, malformed header or config, truncated file
  MismatchError              6   the adapter does not fit this base
  RemoteError                7   a remote failed
    UnreachableError             it cannot be reached
    ProtocolError                it answered something it should not

Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base of every error a user should read; `hint` is one thing to type or do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InvalidError(AdapterError):
    exit_code = 2


class NotFoundError(AdapterError):
    exit_code = 3


class ConflictError(AdapterError):
    exit_code = 4


class DamagedError(AdapterError):
    exit_code = 5


class MismatchError(AdapterError):
    exit_code = 6


class RemoteError(AdapterError):
    exit_code = 7


class UnreachableError(RemoteError):
    pass


class ProtocolError(RemoteError):
    pass


class AdapterWarning(UserWarning):
    """Something a user should know and that does not stop the work."""
