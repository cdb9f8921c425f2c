"""adapter run"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.app import App, pass_app
from adapterkit.cli.merge import parsed
from adapterkit.cli.output import count, emit, note, readable, side_by_side
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from adapterkit.hub.generate.session import Generated, Session, Settings

SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")


@click.command()
@click.argument("sources", metavar="SRC[=WEIGHT]...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", required=True, help="A folder or ORG/NAME.")
@click.option("--prompt", metavar="TEXT", help="What to go on from; - reads it from stdin.")
@click.option(
    "--prompt-file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Read the prompt from FILE.",
)  # fmt: skip
@click.option("--system", metavar="TEXT", help="The system message of a chat.")
@click.option("--raw", is_flag=True, help="Use no chat template.")
@click.option(
    "--compare", is_flag=True, help="Show the base, each adapter alone and all of them too."
)
@click.option(
    "--quantization", type=click.Choice(["nf4", "fp4", "int8", "none"]),
    help="How BASE is loaded.  [default: as it is stored]",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of what is not quantized.  [default: as in BASE]",
)  # fmt: skip
@click.option("--device", metavar="D", help="cpu, cuda, cuda:1.  [default: cuda if there is one]")
@click.option(
    "--max-new-tokens", type=int, default=256, show_default=True, metavar="N",
    help="Write N tokens at most.",
)  # fmt: skip
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, metavar="T",
    help="0 takes the likeliest token each time, more draws.",
)  # fmt: skip
@click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest, P in all.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option(
    "--tokenizer", metavar="MODEL",
    help="A folder or ORG/NAME.  [default: what the adapters bring, or BASE's]",
)  # fmt: skip
@click.option("--resize", is_flag=True, help="Grow the vocabulary to that of the adapters.")
@click.option(
    "--dialect", type=click.Choice(["exact", "peft"]), default="exact", show_default=True,
    help="How adapters are added up.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Let doubts count as not fitting.")
@click.option(
    "--allow-field", "allow_fields", metavar="NAME", multiple=True,
    help="Accept this config field although its meaning is unknown. Repeatable.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def command(
    app: App, /, sources: tuple[str, ...], base: str, prompt: str | None, prompt_file: Path | None,
    system: str | None, raw: bool, compare: bool, as_json: bool, tokenizer: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Generate text with adapters on their base.

    SRC is a folder (./tone) or a reference (team/sql@1.2); its WEIGHT is 1 when left out, and
    negative ones subtract. What is written after the prompt is printed as it comes.

    Where the tokenizer has a chat template, the prompt is the message of a user in it; --raw takes
    it as it is. A line break at the end of a prompt that is read does not count. Settings that are
    not given here are those of BASE's generation_config.json.
    """
    if compare and options["resize"]:
        raise InvalidError("--compare shows the base alone, which has no rows to --resize with")
    weights, text = parsed(sources), _prompt(prompt, prompt_file)
    from adapterkit.hub.generate.prompts import Ask
    from adapterkit.hub.generate.session import Settings

    settings = Settings(**{name: options.pop(name) for name in SETTINGS})
    session = _prepared(app, weights, base, Ask(text, system, raw), tokenizer, options)
    if session.chosen.own:
        note(app, "Tokenizer", f"that of {session.chosen.name}")
    if not compare and not as_json:
        _tell(app, session, _streamed(session, settings))
        return
    asked = session.compositions() if compare else [session.weights]
    made = list(_generated(app, session, settings, asked))
    if as_json:
        emit(record(session, settings, text, made))
    else:
        side_by_side([label(each.weights) for each in made], [each.text for each in made])
    for each in made:
        _tell(app, session, each)


def _prompt(given: str | None, file: Path | None) -> str:
    if (given is None) == (file is None):
        raise InvalidError("give one prompt", hint="--prompt TEXT, or --prompt-file FILE")
    if file is not None:
        data, place = file.read_bytes(), str(file)
    elif given == "-":
        data, place = sys.stdin.buffer.read(), "stdin"
    else:
        data, place = (given or "").encode("utf-8", "surrogateescape"), "--prompt"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidError(f"{place} is no UTF-8 text: {error.reason}") from error
    return text if place == "--prompt" else text.removesuffix("\n").removesuffix("\r")


def _prepared(
    app: App, weights: Mapping[str, float], base: str, ask: Any, tokenizer: str | None,
    options: dict[str, Any],
) -> Session:  # fmt: skip
    from adapterkit.hub.bases.folder import find_base
    from adapterkit.hub.generate.prepare import prepare

    with loading(app):
        return prepare(
            find_base(base), weights, ask, tokenizer=find_base(tokenizer) if tokenizer else None,
            registry=app.registry, **options,
        )  # fmt: skip


@contextmanager
def loading(app: App) -> Iterator[None]:
    """The bars of transformers, which it draws even where there is no terminal, on terminals."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if app.quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _streamed(session: Session, settings: Settings) -> Generated:
    """The text, and the end of its line, however it ends."""
    on_terminal, begun = sys.stdout.isatty(), False

    def write(text: str) -> None:
        nonlocal begun
        begun = True
        click.echo(readable(text) if on_terminal else text, nl=False)

    try:
        made = session.generate(session.weights, settings, write)
    except BaseException:
        click.echo(nl=begun)
        raise
    click.echo()
    return made


def _generated(
    app: App, session: Session, settings: Settings, asked: Sequence[Mapping[str, float]]
) -> Iterator[Generated]:
    with waiting(app) as status:
        for number, weights in enumerate(asked, 1):
            status(f"Generating with {label(weights)} ({number} of {len(asked)})")
            yield session.generate(weights, settings, lambda text: None)


@contextmanager
def waiting(app: App) -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is being done, on terminals."""
    if app.quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(Text(readable(text)))


def label(weights: Mapping[str, float]) -> str:
    """`base`; `sql`; `0.7 sql + -0.3 tone`."""
    parts = [name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()]
    return " + ".join(parts) or "base"


def _tell(app: App, session: Session, made: Generated) -> None:
    """What the text does not say: that it was cut short by the model, or with -v why it ends."""
    if made.end == "full":
        note(app, "Warning", f"{label(made.weights)} ends here: the model has no more positions")
    elif app.detailed:
        why = "its end" if made.end == "stop" else "all that were asked for"
        note(app, "Note", f"{label(made.weights)}: {count(made.n_tokens, 'token')}, {why}")


def record(
    session: Session, settings: Settings, prompt: str, made: Sequence[Generated]
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "prompt_tokens": session.prompt.size,
        "chat": session.prompt.chat,
        "tokenizer": session.chosen.name,
        "settings": asdict(settings),
        "outputs": [
            {
                "label": label(each.weights),
                "weights": each.weights,
                "text": each.text,
                "tokens": each.n_tokens,
                "end": each.end,
            }
            for each in made
        ],
    }
