"""What the global options say, shared by every command."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from adapterkit.registry import Registry


@dataclass
class App:
    """home: where the registry lies; None: $ADAPTERKIT_HOME or the platform's data folder.

    verbosity: 0 results and errors only, 1 also warnings, hints and progress, 2 also details.
    """

    home: Path | None = None
    verbosity: int = 1
    offline: bool = False
    single_writer: bool = False

    @cached_property
    def registry(self) -> Registry:
        from adapterkit.registry import Registry

        return Registry(self.home, single_writer=self.single_writer)

    @property
    def cache(self) -> Path:
        """What can be computed again: hashes of files that have not changed."""
        from platformdirs import user_cache_path

        return user_cache_path("adapterkit", appauthor=False)

    def close(self) -> None:
        if "registry" in self.__dict__:  # opened by this command
            self.registry.close()

    @property
    def detailed(self) -> bool:
        return self.verbosity > 1

    @property
    def quiet(self) -> bool:
        return self.verbosity < 1


pass_app = click.make_pass_decorator(App)
