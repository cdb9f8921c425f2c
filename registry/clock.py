"""When, and who."""

from __future__ import annotations

import os
from datetime import UTC, datetime


def now() -> str:
    """UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def author() -> str:
    """ADAPTERKIT_AUTHOR, else user@host."""
    given = os.environ.get("ADAPTERKIT_AUTHOR") or f"{_user()}@{_host()}"
    return "".join(c for c in given if c.isprintable())[:200]


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without an account, as in containers
        return f"uid{os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _host() -> str:
    import platform

    return platform.node() or "localhost"
