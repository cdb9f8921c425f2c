"""adapter tag"""

from __future__ import annotations

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.output import say
from adapterkit.registry.errors import InvalidError
from adapterkit.registry.refs import Ref


@click.command()
@click.argument("ref")
@click.argument("tag", required=False)
@click.option(
    "--from", "expected", metavar="VERSION",
    help="Only if TAG is at VERSION now, or, with 'none', if there is no such tag.",
)  # fmt: skip
@click.option("--undo", "act", flag_value="undo", help="Take back the last move of NAME:TAG.")
@click.option(
    "--protect", "act", flag_value="protect", help="Let NAME:TAG neither be moved nor removed."
)
@click.option("--unprotect", "act", flag_value="unprotect", help="End that.")
@pass_app
def command(app: App, ref: str, tag: str | None, expected: str | None, act: str | None) -> None:
    """Point a tag at a version.

    TAG is a word such as prod. It may be moved later, `adapter rm NAME:TAG` takes it away, and
    `adapter log NAME:TAG` shows where it has been. With --undo, --protect or --unprotect REF is
    NAME:TAG, and that is all.
    """
    if act is not None:
        change(app, act, ref, tag or expected)
        return
    if tag is None:
        raise InvalidError(f"{ref} gets no tag", hint=f"adapter tag {ref} TAG")
    version = app.registry.resolve(Ref.parse(ref))
    before = app.registry.tag(version.ref, tag, expected=expected)
    moved = f", before {before.version}" if before and before.version != version.version else ""
    say(f"{version.ref.short_name}:{tag} is {version.version}{moved}")


def change(app: App, act: str, ref: str, superfluous: str | None) -> None:
    wanted = Ref.parse(ref)
    if superfluous is not None or wanted.tag is None:
        raise InvalidError(
            f"--{act} takes NAME:TAG and nothing else",
            hint=f"adapter tag {wanted.short_name}:{wanted.tag or 'TAG'} --{act}",
        )
    if act == "undo":
        move = app.registry.undo(wanted)
        say(f"{wanted} is {move.after or 'removed'}, before {move.before or 'not there'}")
        return
    version = app.registry.protect(wanted, act == "protect")
    state = "protected" if act == "protect" else "not protected"
    say(f"{wanted} is {version.version}, and {state}")
