"""The demo shows what it says, fails when that is not so, and leaves nothing behind."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from adapterkit.cli.demo import folded, suggestions, workplace
from adapterkit.cli.main import main
from adapterkit.hub.compose.handle import Adapters
from adapterkit.hub.demo import claims, corpus, model, story
from adapterkit.hub.demo.claims import DemoError
from adapterkit.hub.findings import Report
from adapterkit.registry import Registry

PROGRAM = """
import sys
from adapterkit.cli.main import main
{patch}
main(["demo", *sys.argv[1:]])
"""
SHORT = "from adapterkit.hub.demo import story; story.BASE_STEPS = 20"


def start(cwd: Path, *arguments: str, patch: str = "") -> subprocess.Popen[str]:
    """`adapter demo ARGUMENTS` in `cwd`, with the user's home and temporary files in there."""
    home, temp = cwd / "home", cwd / "temp"
    home.mkdir()
    temp.mkdir()
    places = {"HOME": str(home), "TMPDIR": str(temp), "ADAPTERKIT_HOME": str(home / "adapterkit")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(patch=patch), *arguments],
        cwd=cwd, env=os.environ | places, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def rows_of(output: str) -> dict[str, list[float]]:
    """The table of losses: label -> one number for each world."""
    n = len(corpus.WORLDS)
    parts = [line.split() for line in output.splitlines() if line.startswith("   ")]
    found = {}
    for words in parts:
        try:
            found[" ".join(words[:-n])] = [float(word) for word in words[-n:]]
        except ValueError:
            continue
    return {label: row for label, row in found.items() if len(row) == n and label}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """`adapter demo --keep`, run once: where, and what it printed."""
    place = tmp_path_factory.mktemp("kept")
    process = start(place, "--keep", "play")
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, output + errors
    return place, output, errors


@pytest.fixture(scope="module")
def played(kept):
    """That demo, and its last step once more."""
    demo = story.Demo(kept[0] / "play", lambda label, done, total: None)
    with Registry(demo.store) as registry:
        demo.trained = {task: registry.metrics(f"demo/{task}")["loss"] for task in corpus.TASKS}
    with model.undisturbed():
        return demo, demo.compose()


@pytest.fixture
def again(played, tmp_path):
    """The same demo in a copy of its folder, its registry still to be filled."""
    demo = copy.copy(played[0])
    demo.root = tmp_path / "again"
    shutil.copytree(played[0].root, demo.root)
    demo.base, demo.store, demo.remote = (demo.root / n for n in ("base", "registry", "remote"))
    for folder in (demo.store, demo.remote, demo.root / "other", demo.root / "wider"):
        shutil.rmtree(folder)
    return demo


def test_the_demo_shows_what_every_composition_does(kept):
    rows = rows_of(kept[1])
    assert list(rows) == ["base", *corpus.TASKS, claims.MIX, claims.UNDONE, "detached"]
    assert rows["detached"] == rows["base"]
    assert rows[claims.UNDONE] == rows["sea"]
    assert rows["sea"][1] < rows[claims.MIX][1] < rows["base"][1]
    assert rows["kitchen"][2] < rows[claims.MIX][2] < rows["base"][2]


def test_the_demo_fits_a_terminal_and_draws_no_bars_elsewhere(kept):
    _, output, errors = kept
    assert [line for line in output.splitlines() if len(line) > 80] == []
    assert not any(mark in errors for mark in ("━", "it/s", "Training", "%|"))


def test_the_demo_writes_to_its_own_folder_only(kept):
    place = kept[0]
    assert {path.relative_to(place).parts[0] for path in files_below(place)} == {"play"}
    assert list((place / "temp").iterdir()) == []


def test_without_keep_the_folder_is_removed():
    with workplace(None) as folder:
        (folder / "base").mkdir()
    assert not folder.exists()


@pytest.mark.parametrize("ending", [KeyboardInterrupt, DemoError])
def test_the_folder_is_removed_whatever_happens(ending):
    with pytest.raises(ending), workplace(None) as folder:
        raise ending("in the middle")
    assert not folder.exists()


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    process = start(tmp_path, patch=SHORT)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("1."):
        assert process.poll() is None, process.communicate()
    assert files_below(tmp_path / "temp") != []
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert files_below(tmp_path) == []
    assert list((tmp_path / "temp").iterdir()) == []


def test_keep_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine").write_text("precious")
    done = CliRunner().invoke(main, ["demo", "--keep", str(tmp_path)])
    assert done.exit_code == 4
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_every_suggested_command_works_on_a_kept_demo(kept, monkeypatch):
    monkeypatch.chdir(kept[0])
    (export, _), *commands = suggestions(Path("play")).items()
    monkeypatch.setenv(*export.removeprefix("export ").split("=", 1))
    for line, comment in commands:
        program, *arguments = shlex.split(line)
        done = CliRunner().invoke(main, arguments)
        assert line in kept[1]
        assert program == "adapter"
        assert done.exit_code == (6 if comment == "refused" else 0), done.output


def test_suggested_folders_are_paths_and_never_hub_models():
    words = [word for line in suggestions(Path("play/x")) for word in re.split("[ =]", line)]
    assert [word for word in words if "play" in word and not word.startswith("./play/x/")] == []


def test_long_lines_are_folded_under_their_indent():
    lines = folded("  " + "word " * 40).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 80 for line in lines)
    assert [line[:7].isspace() for line in lines] == [False] + [True] * (len(lines) - 1)


def test_held_out_sentences_are_never_trained_on():
    for world in corpus.WORLDS:
        trained = set(corpus.text(world, story.SENTENCES).split(". "))
        held_out = set(corpus.text(world, story.HELD_OUT, held_out=True).split(". "))
        assert {s.rstrip(".") for s in trained} & {s.rstrip(".") for s in held_out} == set()


@pytest.mark.parametrize(
    ("row", "world", "change"),
    [
        ("base", "farm", 2.0),  # the base has learnt nothing
        ("sea", "sea", 4.0),  # an adapter without effect
        ("kitchen", "sea", -3.6),  # an adapter that is another one
        (claims.MIX, "sea", 5.0),
        (claims.MIX, "kitchen", -3.2),
        (claims.UNDONE, "farm", 2e-4),
        ("detached", "space", 1e-12),
        ("space", "space", 2e-4),  # not what was trained
    ],
)
def test_a_loss_that_is_not_as_claimed_fails(played, row, world, change):
    demo, last = played
    losses = {name: dict(columns) for name, columns in last.losses.items()}
    claims.require_losses(losses, demo.trained)
    losses[row][world] += change
    with pytest.raises(DemoError, match="the demo shows that"):
        claims.require_losses(losses, demo.trained)


def test_an_adapter_without_effect_fails(again):
    path = again.root / "adapters" / "sea" / "adapter_model.safetensors"
    zeroed = {key: tensor * (".lora_A." in key) for key, tensor in load_file(path).items()}
    save_file(zeroed, path)
    again.add()
    with pytest.raises(DemoError, match="the adapter sea has less than half the loss"):
        again.compose()


def test_a_check_that_accepts_other_weights_fails(again, monkeypatch):
    again.add()
    accepting = Report("same-weights-cast", (), "sketch")
    monkeypatch.setattr(story, "check", lambda *source, **settings: accepting)
    with pytest.raises(DemoError, match="'other' is other-weights, but found same-weights-cast"):
        again.check()


def test_a_pull_that_does_not_verify_fails(again, monkeypatch):
    again.add()
    monkeypatch.setattr(story.sync, "pull", lambda *arguments, **settings: True)
    with pytest.raises(DemoError, match="a pull took a blob with a wrong byte"):
        again.push_and_pull()


def test_an_activation_that_forgets_weights_fails(again, monkeypatch):
    again.add()
    activate = Adapters.activate
    monkeypatch.setattr(Adapters, "activate", lambda self, weights: activate(self, list(weights)))
    with pytest.raises(DemoError, match="within 0.0001, but found a difference"):
        again.compose()


def test_a_detach_that_leaves_something_fails(again, monkeypatch):
    again.add()
    monkeypatch.setattr(Adapters, "detach", lambda self: None)
    with pytest.raises(DemoError, match="detached on farm is base"):
        again.compose()
