"""The command `adapter`: global options, the table of commands, and the one place errors end."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.app import App
from adapterkit.cli.output import note, safe
from adapterkit.registry.errors import AdapterError, AdapterWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

# name -> what `adapter --help` says; the command itself is `command` in the file of that name.
COMMANDS = {
    "add": "Store an adapter folder as a new version of NAME.",
    "list": "List adapters and versions.",
    "search": "Find versions by words, best match first.",
    "show": "Show everything recorded about one version.",
    "inspect": "Show how an adapter is understood: format, kind, every tensor.",
    "log": "Show what happened to an adapter, newest first.",
    "diff": "Show what differs between two adapters.",
    "compare": "Show how alike adapters are, and what adding them puts at stake.",
    "tag": "Point a tag at a version.",
    "rm": "Remove a version, or a tag.",
    "yank": "Say that a version should not be used any more.",
    "mv": "Give an adapter another name.",
    "du": "Show how much room adapters take.",
    "verify": "Read everything stored and say what is damaged.",
    "gc": "Free the room of what no version needs.",
    "backup": "Copy the whole registry into one file.",
    "restore": "Make the registry anew from a file that `backup` wrote.",
    "upgrade": "Bring the registry to the format of this program.",
    "blend": "Blend adapters into one.",
    "extract": "Make a LoRA of what fine-tuning changed in a whole model.",
    "convert": "Make a plain LoRA of an adapter of another kind.",
    "export": "Write the files of a version into a folder.",
    "check": "Say whether adapters fit their base model.",
    "base": "Show the identity of a base model.",
    "merge": "Put adapters into the weights of their base.",
    "run": "Generate text with adapters on their base.",
    "push": "Send an adapter to a remote.",
    "pull": "Fetch an adapter from a remote.",
    "remote": "Name remotes.",
    "demo": "Play the whole story on a tiny model, from nothing.",
}
INTERRUPTED = 130


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"adapterkit.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # from the table: --help imports no command
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            with warned(ctx):
                return super().invoke(ctx)
        except AdapterError as error:
            fail(ctx, str(error), error.hint, error.exit_code)
        except BrokenPipeError:
            raise  # click ends quietly: the reader of our output has seen enough
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            fail(ctx, f"{place}{error.strerror or error}", None, AdapterError.exit_code)
        except KeyboardInterrupt:
            fail(ctx, "interrupted", None, INTERRUPTED)
        return None


def fail(ctx: click.Context, message: str, hint: str | None, code: int) -> None:
    click.echo(f"{click.style('Error:', fg='red')} {safe(message)}", err=True)
    if hint:
        click.echo(f"{click.style('Hint:', fg='yellow')} {safe(hint)}", err=True)
    ctx.exit(code)


@contextmanager
def warned(ctx: click.Context) -> Iterator[None]:
    """Shows our own warnings as one line; those of other libraries stay as Python has them."""
    python = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: object) -> None:
        if issubclass(category, AdapterWarning):
            note(ctx.find_object(App) or App(), "Warning", str(message))
        else:
            python(message, category, *place)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.simplefilter("always", AdapterWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # slow to import, so only here

        click.echo(f"adapter {version('adapterkit')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the registry.  [default: $ADAPTERKIT_HOME, or the data folder of the user]",
)
@click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print details too.")
@click.option("--no-color", is_flag=True, help="Print without colors; so does $NO_COLOR.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option(
    "--single-writer", is_flag=True,
    help="Write where locks cannot be trusted (NFS, SMB): no other process may.",
)  # fmt: skip
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version,
    help="Print the version and exit.",
)  # fmt: skip
@click.pass_context
def main(
    ctx: click.Context, home: Path | None, quiet: bool, verbose: bool, no_color: bool,
    offline: bool, single_writer: bool,
) -> None:  # fmt: skip
    """A home for the adapters of a base model: versions, checks, remotes."""
    if no_color or os.environ.get("NO_COLOR"):
        ctx.color = False
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub, which is imported later
    ctx.obj = App(home, 0 if quiet else 2 if verbose else 1, offline, single_writer)
    ctx.call_on_close(ctx.obj.close)
