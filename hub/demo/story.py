"""The story of the demo, told through the public API: make, add, check, push, pull, compose."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterkit.hub import attach, check, ingest, load, remotes, sync
from adapterkit.hub.arrival import recheck
from adapterkit.hub.demo import claims, corpus, lora, model
from adapterkit.hub.demo.claims import BASE, DETACHED, MIX, UNDONE, A, B, Losses, require
from adapterkit.hub.demo.corpus import PLAIN, TASKS
from adapterkit.hub.findings import INCOMPATIBLE, OTHER_WEIGHTS, SAME_CAST
from adapterkit.hub.remotes.base import Remote
from adapterkit.registry import DamagedError, Ref, Registry

BASE_STEPS, ADAPTER_STEPS = 350, 200
SENTENCES, HELD_OUT = 3000, 60
# Rows of a batch that repeat what the base knows, so that an adapter does not undo it.
REPEATED = 3
# B a second time, so that it can be subtracted while it is still added.
AGAIN = f"{B} again"
COMPOSITIONS: dict[str, dict[str, float]] = {
    **{task: {task: 1} for task in TASKS},
    MIX: {A: 0.7, B: 0.3},
    UNDONE: {A: 1, B: 1, AGAIN: -1},
}
COMPOSE = (
    f'>>> adapters = attach(model, {{"{A}": "demo/{A}", "{B}": "demo/{B}"}})',
    f'>>> adapters.activate({{"{A}": 0.7, "{B}": 0.3}})',
    ">>> adapters.detach()",
)


@dataclass(frozen=True)
class Step:
    """What was done and seen. commands: what does it outside of the demo."""

    title: str
    lines: tuple[str, ...]
    commands: tuple[str, ...] = ()
    losses: Losses = field(default_factory=dict)


class Demo:
    """root: an empty folder for everything the demo makes."""

    def __init__(self, root: Path, progress: model.Progress) -> None:
        self.root, self.progress = root.absolute(), progress
        self.base, self.store, self.remote = (self.root / n for n in ("base", "registry", "remote"))
        self.training = {w: model.encode(corpus.text(w, SENTENCES)) for w in corpus.WORLDS}
        self.held_out = {
            w: model.encode(corpus.text(w, HELD_OUT, held_out=True)) for w in corpus.WORLDS
        }
        self.trained: dict[str, float] = {}

    def steps(self) -> Iterator[Step]:
        """Does the steps one by one. Raises DemoError at the first that is not as claimed."""
        with model.undisturbed():
            yield self.train_base()
            yield self.train_adapters()
            yield self.add()
            yield self.check()
            yield self.push_and_pull()
            yield self.compose()

    def train_base(self) -> Step:
        network = model.tiny_model(seed=0)
        before = model.loss(network, self.held_out[PLAIN])
        rows = [(self.training[PLAIN], model.BATCH)]
        report = partial(self.progress, "Training the base")
        model.train(network, network.parameters(), rows, BASE_STEPS, report)
        after = model.loss(network, self.held_out[PLAIN])
        model.save_model(network, self.base)
        size = sum(parameter.numel() for parameter in network.parameters())
        lines = (
            f"Llama, {model.LAYERS} layers, hidden size {model.HIDDEN}, {size:,} parameters",
            f"loss by letter on unseen sentences {before:.2f} -> {after:.2f}; it writes:",
            "  " + model.continuation(network, f"the {corpus.first_noun(PLAIN)} "),
        )
        return Step("Train a tiny base model", lines)

    def train_adapters(self) -> Step:
        network = self._load_nf4()
        lines = []
        for seed, task in enumerate(TASKS, 1):
            before = model.loss(network, self.held_out[task])
            after, written = self._train_adapter(network, task, seed)
            self.trained[task] = after
            lines += [f"{task:8} loss {before:.2f} -> {after:.2f}; it writes:", f"  {written}"]
        return Step(f"Train three adapters on it in NF4 (QLoRA, rank {lora.RANK})", tuple(lines))

    def _train_adapter(self, network: PreTrainedModel, task: str, seed: int) -> tuple[float, str]:
        loras = lora.put_on(network, seed)
        parameters = [p for each in loras.values() for p in each.parameters()]
        rows = [(self.training[task], model.BATCH - REPEATED), (self.training[PLAIN], REPEATED)]
        report = partial(self.progress, f"Training {task}")
        model.train(network, parameters, rows, ADAPTER_STEPS, report)
        written = model.continuation(network, f"the {corpus.first_noun(task)} ")
        seen = model.loss(network, self.held_out[task]), written
        lora.take_off(loras)
        lora.save_peft(loras, self.root / "adapters" / task, base=self.base.name)
        return seen

    def _load_nf4(self) -> PreTrainedModel:
        return load(self.base, quantization="nf4", device="cpu", dtype=torch.float32)

    def add(self) -> Step:
        with Registry(self.store) as registry:
            for task, loss in self.trained.items():
                ingest.add(
                    registry, self.root / "adapters" / task, f"demo/{task}", base=self.base,
                    trained_on="nf4", metrics={"loss": loss},
                )  # fmt: skip
            lines = [
                f"{version.ref!s:18} LoRA rank {version.facts.rank}, {version.size:,} bytes,"
                f" sha256:{version.id[:12]}"
                for version in registry.list()
            ]
        command = f"$ adapter add ./adapters/{A} demo/{A} --base ./base --trained-on nf4"
        return Step("Add them to a registry", tuple(lines), (command, "$ adapter list"))

    def check(self) -> Step:
        """The right base is accepted; other weights in the same shapes, and other shapes, not."""
        other = model.save_model(model.tiny_model(seed=1), self.root / "other")
        wider = model.save_model(model.tiny_model(seed=0, hidden=128), self.root / "wider")
        expected = {self.base: SAME_CAST, other: OTHER_WEIGHTS, wider: INCOMPATIBLE}
        lines: list[str] = []
        with Registry(self.store) as registry:
            for base, verdict in expected.items():
                report = check(f"demo/{A}", base=base, registry=registry)
                claim = f"demo/{A} on the base {base.name!r} is {verdict}"
                require(report.verdict == verdict, claim, report.verdict)
                lines.append(f"./{base.name}: {report.verdict}, compared: {report.level}")
                lines += [f"  refused: {finding}" for finding in report.errors[:1]]
                more = len(report.errors) - 1
                lines += [f"  and {more} more findings"] if more > 0 else []
        commands = (f"$ adapter check demo/{A} --base ./other",)
        return Step("Check one of them against its base and two others", tuple(lines), commands)

    def push_and_pull(self) -> Step:
        """Everything goes to the remote and comes back, after the registry is lost."""
        remote = remotes.connect(self.remote.as_uri())
        with Registry(self.store) as registry:
            before = {version.ref: version.id for version in registry.list()}
            sent = 0
            for ref in before:
                plan = sync.plan_push(registry, ref, remote)
                sync.push(registry, plan, remote)
                sent += plan.size
            files = registry.manifest(f"demo/{A}").files
            weights = next(file.digest for file in files if file.role == "weights")
        shutil.rmtree(self.store)
        with Registry(self.store) as registry:
            refusal = self._pull_damaged(registry, remote, weights)
            left = len(registry.list())
            for ref in before:
                sync.pull(registry, sync.plan_pull(registry, remote, ref), remote, recheck=recheck)
            after = {version.ref: version.id for version in registry.list()}
        require(left == 0, "no version comes out of a refused pull", f"{left}")
        require(after == before, "what is pulled is what was pushed", "other versions")
        lines = (
            f"sent {len(before)} versions, {sent:,} bytes; then the registry is deleted",
            f"a byte changed in the remote: refused, {refusal}",
            f"the byte put back: {len(after)} versions pulled, ids and bytes as they were",
        )
        commands = (
            f"$ adapter push demo/{A} file:///.../remote",
            f"$ adapter pull file:///.../remote#demo/{A}",
        )
        return Step("Push to a remote, lose the registry, pull", lines, commands)

    def _pull_damaged(self, registry: Registry, remote: Remote, digest: str) -> str:
        """What a pull says to a blob with one wrong byte, which is put right again."""
        (blob,) = self.remote.rglob(digest)
        data, mode = blob.read_bytes(), blob.stat().st_mode
        blob.chmod(0o644)
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        try:
            plan = sync.plan_pull(registry, remote, Ref.parse(f"demo/{A}"))
            sync.pull(registry, plan, remote, recheck=recheck)
        except DamagedError as error:
            return str(error)
        finally:
            blob.write_bytes(data)
            blob.chmod(mode)
        raise claims.DemoError("a pull took a blob with a wrong byte, expected DamagedError")

    def compose(self) -> Step:
        network = self._load_nf4()
        contents = _contents(network)
        losses, logits = {BASE: self._losses(network)}, {BASE: self._logits(network)}
        sources = {task: f"demo/{task}" for task in TASKS} | {AGAIN: f"demo/{B}"}
        with Registry(self.store) as registry:
            adapters = attach(network, sources, registry=registry)
        for row, weights in COMPOSITIONS.items():
            adapters.activate(weights)
            losses[row], logits[row] = self._losses(network), self._logits(network)
        adapters.detach()
        losses[DETACHED], logits[DETACHED] = self._losses(network), self._logits(network)
        claims.require_losses(losses, self.trained)
        apart = float((logits[UNDONE] - logits[A]).abs().max())
        claims.require_same(UNDONE, A, apart)
        after = _contents(network) | {"logits": logits[DETACHED]}
        claims.require_equal(after, contents | {"logits": logits[BASE]})
        lines = (
            f"{', '.join(TASKS)}: as they were when trained, within {claims.TOLERANCE:g}",
            f"{MIX}: on both texts between its two parts and the base",
            f"{UNDONE}: {A} again, logits at most {apart:.0e} apart",
            f"{DETACHED}: the base again, logits and {len(contents)} tensors bit for bit",
        )
        return Step("Compose them on the base in NF4: loss by text", lines, COMPOSE, losses)

    def _logits(self, network: PreTrainedModel) -> Tensor:
        return model.logits(network, self.held_out[A])

    def _losses(self, network: PreTrainedModel) -> dict[str, float]:
        return {world: model.loss(network, ids) for world, ids in self.held_out.items()}


def _contents(network: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, quantized weights as they are packed."""
    found = dict(network.named_parameters()) | dict(network.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in found.items()}
