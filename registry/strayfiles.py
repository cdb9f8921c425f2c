"""Files in the folder of a registry that are not where, or not what, they should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from adapterkit.registry import layout, problems
from adapterkit.registry.blobcheck import Needed, Seen
from adapterkit.registry.blobs import Blobs
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.files import Files
from adapterkit.registry.problems import Problem
from adapterkit.registry.strictjson import parse_object


def misnamed(
    blobs: Blobs,
    strange: Iterable[tuple[Path, Seen]],
    needs: Needed,
    shown: Callable[[str], str],
) -> list[Problem]:
    """Files among the blobs under a name that is none; those that are blobs by their bytes."""
    faults, home = [], blobs.root.parent.parent
    for path, seen in strange:
        where = path.relative_to(home).as_posix()
        if seen.digest in needs.sizes:
            lost = blobs.stamp(seen.digest) is None
            repair = f"rename it to {shown(seen.digest)}" if lost else "delete it"
            detail, affects = f"holds the bytes of {seen.digest[:12]}", needs.by(seen.digest)
            faults.append(Problem(problems.MISNAMED, where, detail, affects, repair))
        else:
            detail = f"is no blob: {seen.error}" if seen.error else "is no blob's name"
            faults.append(Problem(problems.MISNAMED, where, detail, (), "delete it"))
    return faults


def leftovers(home: Path, files: Files) -> list[Problem]:
    found = [
        Problem(problems.STRAY, name, "is not part of a registry", (), "move it elsewhere")
        for name in layout.strange(home, files)
    ]
    for name in files.listdir(home):
        if layout.LOST.match(name) and not name.endswith(("-wal", "-shm")):
            detail = "is a catalog that was replaced, and may know what the log or a blob lost"
            repair = "delete it when nothing is missed"
            found.append(Problem(problems.STRAY, name, detail, (), repair))
    for name in files.listdir(home / "tmp") if (home / "tmp").is_dir() else []:
        detail = "is being written, or was left by an interruption"
        repair = "adapter gc removes it after a day"
        found.append(Problem(problems.STRAY, f"tmp/{name}", detail, (), repair))
    return found + _aliases(home, files)


def _aliases(home: Path, files: Files) -> list[Problem]:
    try:
        with files.open(home / "remotes.json") as file:
            parse_object(file.read(), "it")
    except FileNotFoundError:
        pass
    except (DamagedError, OSError) as error:
        repair = "delete it, then adapter remote add"
        return [Problem(problems.CHANGED, "remotes.json", str(error), ("remotes",), repair)]
    return []
