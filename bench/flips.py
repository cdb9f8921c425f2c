"""How many flipped bits does each find?   python bench/flips.py [FLIPS]

The same adapters lie in a registry, in a Hugging Face cache, and in a folder with a list of
checksums. One bit of a file at a time is flipped, chosen by bytes, half of them in the adapters'
files and half in what the store itself has written; then `adapter verify`, `hf cache verify` (of
the repository concerned) or `sha256sum -c` is asked, and the bit is put back.

`hf cache verify` keeps no checksums: it asks the server for them, and does not run without one. So
a server on this machine tells what was recorded before the first flip.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from adapterkit.registry import Meaning, Registry
from adapterkit.registry.verify import verify

NAMES = ("team/sql", "team/tone", "team/math")
REVISION = "a" * 40
SUMS = "SHA256SUMS"
Check = Callable[[Path], bool]


def adapters(chosen: random.Random) -> dict[str, dict[str, bytes]]:
    config = b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'
    return {
        name: {"adapter_config.json": config, "adapter_model.safetensors": chosen.randbytes(20_000)}
        for name in NAMES
    }


def make_registry(home: Path, have: dict[str, dict[str, bytes]]) -> None:
    with Registry(home) as registry:
        for name, files in have.items():
            note = {"note": b"trained on Monday"}
            registry.add(name, files, Meaning({"kind": "lora"}), tags=["prod"], attachments=note)


def make_cache(root: Path, have: dict[str, dict[str, bytes]]) -> None:
    for name, files in have.items():
        repo = root / f"models--{name.replace('/', '--')}"
        for folder in ("blobs", "refs", f"snapshots/{REVISION}"):
            (repo / folder).mkdir(parents=True)
        (repo / "refs/main").write_text(REVISION)
        for path, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            (repo / "blobs" / digest).write_bytes(data)
            (repo / f"snapshots/{REVISION}" / path).symlink_to(f"../../blobs/{digest}")


def make_folder(root: Path, have: dict[str, dict[str, bytes]]) -> None:
    lines = []
    for name, files in have.items():
        for path, data in files.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(data)
            lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}/{path}\n")
    (root / SUMS).write_text("".join(lines))


def tree(files: dict[str, bytes]) -> bytes:
    """What a hub answers: of every file, its size and its sha256."""
    rows = []
    for path, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"oid": digest, "size": len(data), "pointerSize": 130}
        rows.append({"type": "file", "path": path, "oid": "0" * 40, "size": len(data), "lfs": lfs})
    return json.dumps(rows).encode()


@contextmanager
def hub(have: dict[str, dict[str, bytes]]) -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = "/".join(self.path.split("/")[3:5])
            body = tree(have[name]) if name in have else b"{}"
            self.send_response(200 if name in have else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ours(home: Path, path: Path) -> bool:
    return bool(verify(home).damage)


def theirs(root: Path, endpoint: str, path: Path) -> bool:
    """An error is a finding too."""
    from huggingface_hub import HfApi

    repo = path.relative_to(root).parts[0].removeprefix("models--").replace("--", "/")
    try:
        found = HfApi(endpoint=endpoint).verify_repo_checksums(repo, cache_dir=root, token=False)
    except ValueError:
        return True
    return bool(found.mismatches or found.missing_paths)


def by_list(root: Path, path: Path) -> bool:
    command = ["sha256sum", "--check", "--quiet", "--strict", SUMS]
    return subprocess.run(command, cwd=root, capture_output=True, check=False).returncode != 0


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    path.write_bytes(data)


def found(paths: list[Path], check: Check, flips: int, chosen: random.Random) -> tuple[int, int]:
    """How many of the flips in `paths` it tells of, and how many there were."""
    assert not check(paths[0]), "a sound store is called damaged"
    sizes = [path.stat().st_size for path in paths]
    n_found = 0
    for _ in range(flips if paths else 0):
        path = chosen.choices(paths, sizes)[0]
        bit = chosen.randrange(path.stat().st_size * 8)
        flip(path, bit)
        n_found += check(path)
        flip(path, bit)
    assert not check(paths[0]), "a bit was not put back"
    return n_found, flips


def parts(root: Path, have: dict[str, dict[str, bytes]], skipped: str) -> list[list[Path]]:
    """The files of a store that hold the adapters' bytes, and those that it has written itself."""
    known = {data for files in have.values() for data in files.values()}
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink()]
    paths = [p for p in paths if p.stat().st_size and not p.name.startswith(skipped)]
    mine = [p for p in paths if p.read_bytes() in known]
    return [mine, [p for p in paths if p not in mine]]


def main(flips: int) -> int:
    chosen = random.Random(0)
    have = adapters(chosen)
    with tempfile.TemporaryDirectory() as name, hub(have) as endpoint:
        home, cache, folder = (Path(name, each) for each in ("home", "cache", "folder"))
        make_registry(home, have), make_cache(cache, have), make_folder(folder, have)
        sides: dict[str, tuple[Path, Check]] = {
            "`adapter verify`": (home, partial(ours, home)),
            "`hf cache verify`": (cache, partial(theirs, cache, endpoint)),
            "`sha256sum -c`": (folder, partial(by_list, folder)),
        }
        print(f"# {flips} flipped bits\n\nPython {platform.python_version()}, seed 0.\n")
        print("| asked | in the adapters' files | in what the store has written itself |")
        print("|---|---|---|")
        lost = 0
        for what, (root, check) in sides.items():
            # The catalog is a cache, of which many bits mean nothing: tests/registry/test_verify.py
            cells = [found(paths, check, flips // 2, chosen)
                     for paths in parts(root, have, "catalog.db")]  # fmt: skip
            print(f"| {what} | {cells[0][0]} of {cells[0][1]} | {cells[1][0]} of {cells[1][1]} |")
            lost += sum(n - seen for seen, n in cells) if root is home else 0
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
