"""A registry and a model of it in memory, after any sequence of changes, are the same."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapterkit.registry import ConflictError, Meaning, NotFoundError, Registry

pytestmark = pytest.mark.timeout(3000)  # the full figures take their time
NOW = timedelta(0)
NAMES, TAGS = st.sampled_from(["sql", "team/sql", "tone"]), st.sampled_from(["a", "b"])
CONTENTS = st.sampled_from([b"one", b"two", b"three"])
PICK = st.integers(0, 30)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass
class Name:
    """versions: number -> content, of removed ones too."""

    versions: dict[str, bytes] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    tags: dict[str, str] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    yanked: set[str] = field(default_factory=set)

    @property
    def live(self) -> list[str]:
        return [version for version in self.versions if version not in self.removed]

    def pick(self, number: int) -> str | None:
        return self.live[number % len(self.live)] if self.live else None

    def held(self, version: str) -> bool:
        return any(self.tags.get(tag) == version for tag in self.protected)


class Machine(RuleBasedStateMachine):
    n_steps = n_cases = 0

    def __init__(self) -> None:
        super().__init__()
        Machine.n_cases += 1  # what is seen is compared before its first step too
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.registry = Registry(self.folder / "home")
        self.model = {name: Name() for name in ("sql", "team/sql", "tone")}
        self.notes: dict[bytes, set[bytes]] = {}

    def teardown(self) -> None:
        assert self.registry.verify().damage == ()
        self.registry.close()
        shutil.rmtree(self.folder)

    @rule(name=NAMES, content=CONTENTS)
    def add(self, name: str, content: bytes) -> None:
        model = self.model[name]
        made = self.registry.add(name, {"w": content}, Meaning({"kind": "LORA"}))
        same = [v for v in model.live if model.versions[v] == content]
        if same:
            assert (made.ref.version, made.created) == (same[-1], False)
        else:
            assert (made.ref.version, made.created) == (f"1.{len(model.versions)}", True)
            model.versions[f"1.{len(model.versions)}"] = content

    @rule(name=NAMES, content=CONTENTS, number=PICK)
    def add_a_number_that_is_taken(self, name: str, content: bytes, number: int) -> None:
        model = self.model[name]
        version = model.pick(number)
        if version is None or model.versions[version] == content:
            return
        with pytest.raises(ConflictError):
            self.registry.add(name, {"w": content}, Meaning({"kind": "LORA"}), version=version)

    @rule(name=NAMES, tag=TAGS, number=PICK)
    def tag(self, name: str, tag: str, number: int) -> None:
        model, version = self.model[name], self.model[name].pick(number)
        if version is None:
            return
        if tag in model.protected and model.tags.get(tag) != version:
            with pytest.raises(ConflictError):
                self.registry.tag(f"{name}@{version}", tag)
            return
        before = self.registry.tag(f"{name}@{version}", tag)
        assert (before.version if before else None) == model.tags.get(tag)
        model.tags[tag] = version

    @rule(name=NAMES, tag=TAGS)
    def untag(self, name: str, tag: str) -> None:
        model = self.model[name]
        if tag not in model.tags or tag in model.protected:
            with pytest.raises((NotFoundError, ConflictError)):
                self.registry.rm(f"{name}:{tag}")
        else:
            self.registry.rm(f"{name}:{tag}")
            del model.tags[tag]

    @rule(name=NAMES, tag=TAGS, on=st.booleans())
    def protect(self, name: str, tag: str, on: bool) -> None:
        model = self.model[name]
        if tag in model.tags:
            self.registry.protect(f"{name}:{tag}", on)
            (model.protected.add if on else model.protected.discard)(tag)

    @rule(name=NAMES, number=PICK)
    def remove(self, name: str, number: int) -> None:
        model, version = self.model[name], self.model[name].pick(number)
        if version is None:
            return
        if model.held(version):
            with pytest.raises(ConflictError):
                self.registry.rm(f"{name}@{version}")
            return
        self.registry.rm(f"{name}@{version}")
        model.removed.add(version)
        model.tags = {tag: at for tag, at in model.tags.items() if at != version}

    @rule(name=NAMES, number=PICK, on=st.booleans())
    def yank(self, name: str, number: int, on: bool) -> None:
        version = self.model[name].pick(number)
        if version is not None:
            act = self.registry.yank if on else self.registry.unyank
            act(f"{name}@{version}")
            yanked = self.model[name].yanked
            (yanked.add if on else yanked.discard)(version)

    @rule(name=NAMES, number=PICK, text=CONTENTS)
    def note(self, name: str, number: int, text: bytes) -> None:
        version = self.model[name].pick(number)
        if version is not None:
            self.registry.attach(f"{name}@{version}", "note", text)
            self.notes.setdefault(self.model[name].versions[version], set()).add(text)

    @rule()
    def collect(self) -> None:
        self.registry.gc(NOW)

    @rule()
    def rebuild(self) -> None:
        self.registry.rebuild()

    @rule()
    def reopen(self) -> None:
        self.registry.close()
        self.registry = Registry(self.folder / "home")

    @precondition(lambda self: (self.folder / "home" / "catalog.db").exists())
    @rule()
    def lose_the_catalog(self) -> None:
        self.registry.close()
        (self.folder / "home" / "catalog.db").unlink()
        self.registry = Registry(self.folder / "home")

    @invariant()
    def what_is_seen_is_the_model(self) -> None:
        Machine.n_steps += 1
        seen = {name: self.registry.versions(name) for name in self.model}
        for name, model in self.model.items():
            assert [v.version for v in seen[name]] == model.live
            assert {t: v.version for v in seen[name] for t in v.tags} == model.tags
            assert {v.version for v in seen[name] if v.yanked is not None} == (
                model.yanked & set(model.live)
            )
            for version in seen[name]:
                content = model.versions[version.version]
                assert self.registry.files(version.ref)["w"].read_bytes() == content
                notes = [a for a in self.registry.attachments(version.ref) if a.kind == "note"]
                assert {self.registry.read_attachment(a) for a in notes} == self.notes.get(
                    content, set()
                )


@pytest.mark.filterwarnings("ignore:.*was yanked")
def test_a_registry_is_what_its_model_says(proof):
    Machine.TestCase.settings = settings(
        max_examples=proof(15, 350),
        stateful_step_count=proof(25, 50),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Machine.TestCase("runTest").runTest()
    # Hypothesis ends a case before its last step when it likes to.
    assert Machine.n_steps - Machine.n_cases > proof(100, 10_000)
