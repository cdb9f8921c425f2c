"""adapter demo"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill
from time import monotonic
from typing import TYPE_CHECKING, Self

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import say
from adapterkit.registry.errors import ConflictError

if TYPE_CHECKING:
    from rich.progress import Progress

    from adapterkit.hub.demo.story import Step

WIDTH = 80
INDENT = " " * 3


@click.command()
@click.option(
    "--keep", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
    help="Make everything in DIR, which must be new or empty, and leave it there.",
)  # fmt: skip
@pass_app
def command(app: App, keep: Path | None) -> None:
    """Play the whole story on a tiny model, from nothing.

    Trains a tiny base model and three adapters, then adds, checks, pushes, pulls and composes them,
    and tests on the way that every step did what it says. Needs no GPU and no network, takes a
    minute or two, and leaves nothing behind without --keep.
    """
    with workplace(keep) as root, Bars(app) as bars:
        stays = "stays" if keep else "is removed at the end"
        say("A base model, three adapters, a registry and a remote, made on this CPU.")
        say("Nothing is downloaded; every claim is tested, and the first that fails ends it.")
        say(f"Folder: {root}, which {stays}.")
        started = monotonic()
        from adapterkit.hub.demo.story import Demo  # takes seconds, so something is said first

        for number, step in enumerate(Demo(root, bars).steps(), 1):
            now = monotonic()
            tell(number, step, now - started)
            started = now
    suggest(keep)


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """A folder of its own for the demo, removed however it ends; or `keep`, which stays."""
    if keep is None:
        with TemporaryDirectory(prefix="adapter-demo-") as folder:
            yield Path(folder)
        return
    if keep.exists() and any(keep.iterdir()):
        raise ConflictError(f"{keep} is not empty", hint="give --keep a new folder")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


class Bars:
    """One progress bar after the other, on stderr; silent with -q and where that is no terminal."""

    def __init__(self, app: App) -> None:
        self.silent = app.quiet or not sys.stderr.isatty()
        self.bar: Progress | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        if self.silent:
            return
        if self.bar is None:
            self.bar = self._start(label, total)
        self.bar.update(self.bar.task_ids[0], completed=done)
        if done == total:
            self._stop()

    def _start(self, label: str, total: int) -> Progress:
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True), transient=True)
        bar.add_task(label, total=total)
        bar.start()
        return bar

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()


def tell(number: int, step: Step, seconds: float) -> None:
    title = f"{number}. {step.title}"
    took = f"{seconds:.1f} s"
    click.echo()
    click.echo(click.style(title.ljust(WIDTH - len(took)), bold=True) + took)
    for line in step.commands:
        click.echo(click.style(f"{INDENT}{line}", fg="cyan"))
    if step.losses:
        columns = list(next(iter(step.losses.values())))
        say(" " * 28 + "".join(f"{column:>10}" for column in columns))
        for row, losses in step.losses.items():
            say(f"{INDENT}{row:25}" + "".join(f"{losses[column]:10.2f}" for column in columns))
    for line in step.lines:
        say(folded(line))


def folded(line: str) -> str:
    """`line` indented, in as many lines as it needs."""
    indent = INDENT + " " * (len(line) - len(line.lstrip()))
    return fill(
        line.strip(), WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
        break_on_hyphens=False,
    )  # fmt: skip


def suggest(keep: Path | None) -> None:
    click.echo()
    click.echo(click.style("Every claim was tested and holds. What to try next:", bold=True))
    for line, comment in suggestions(keep).items():
        say(f"{INDENT}{line}  # {comment}" if comment else f"{INDENT}{line}")
    click.echo("and with an adapter of yours:")
    say(f"{INDENT}adapter check ./ADAPTER --base ORG/MODEL")
    say(f"{INDENT}adapter add ./ADAPTER team/NAME --base ORG/MODEL")


def suggestions(keep: Path | None) -> dict[str, str]:
    """Commands that work as they stand, and what they do where that is not plain."""
    if keep is None:
        return {"adapter demo --keep playground": "the same, and keeps its folders"}
    # A bare a/b would be a model of the Hub.
    folder = str(keep) if keep.is_absolute() or str(keep).startswith(".") else f"./{keep}"
    store, base, other = (shlex.quote(f"{folder}/{n}") for n in ("registry", "base", "other"))
    return {
        f"export ADAPTERKIT_HOME={store}": "",
        "adapter list": "",
        "adapter show demo/sea": "",
        f"adapter check demo/sea --base {base}": "fits",
        f"adapter check demo/sea --base {other}": "refused",
        f"adapter base {base}": "",
        f"adapter run demo/sea demo/space --base {base} --prompt 'the ' --compare": "",
    }
