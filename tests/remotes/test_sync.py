"""Push and pull between two registries by way of a remote."""

from __future__ import annotations

from datetime import timedelta

import pytest

from adapterkit.hub import sync
from adapterkit.hub.remotes import aliases, connect
from adapterkit.hub.remotes.base import find
from adapterkit.registry import (
    ConflictError,
    DamagedError,
    InvalidError,
    Meaning,
    NotFoundError,
    Ref,
    Registry,
    UnreachableError,
)
from adapterkit.registry.errors import RemoteError

pytestmark = pytest.mark.filterwarnings("ignore:.*was yanked")


def push(registry, ref, remote, **options):
    plan = sync.plan_push(registry, ref, remote, **options)
    sync.push(registry, plan, remote)
    return plan


def pull(registry, remote, ref, name=None, **options):
    plan = sync.plan_pull(registry, remote, ref, name)
    sync.pull(registry, plan, remote, **options)
    return plan


def test_a_version_arrives_as_it_left(here, there, remote):
    push(here, "team/sql@1.0", remote)
    pull(there, remote, "team/sql@1.0")
    one, two = here.resolve("team/sql@1.0"), there.resolve("team/sql@1.0")
    assert (one.id, one.tags, one.facts) == (two.id, two.tags, two.facts)
    assert here.manifest(one.ref).dump() == there.manifest(two.ref).dump()
    for ref, registry in ((one.ref, here), (two.ref, there)):
        assert registry.files(ref)["w.bin"].read_bytes() == b"weights" * 1000
    assert there.metrics("team/sql@1.0") == {"loss": 1}
    for digest in here.manifest(one.ref).blobs():  # the sketch too
        assert there.blob(digest).read_bytes() == here.blob(digest).read_bytes()


def test_a_plan_changes_nothing(here, there, remote, tmp_path):
    plan = sync.plan_push(here, "team/sql", remote)
    assert {piece.name for piece in plan.missing} == {"w.bin", "config.json", "manifest"}
    assert plan.size == sum(piece.size for piece in plan.missing) and not plan.published
    assert not (tmp_path / "remote").exists()
    sync.push(here, plan, remote)
    plan = sync.plan_pull(there, remote, "team/sql")
    assert {piece.name for piece in plan.missing} == {"w.bin", "config.json"}
    assert not (tmp_path / "there").exists()


def test_what_is_there_is_not_sent_again(here, there, remote):
    push(here, "team/sql@1.0", remote)
    again = push(here, "team/sql@1.0", remote)
    assert (again.missing, again.attachments, again.tags, again.published) == ((), (), (), True)
    second = push(here, "team/sql@1.1", remote)
    assert {piece.name for piece in second.missing} == {"w.bin", "manifest"}
    pull(there, remote, "team/sql@1.1")
    first = pull(there, remote, "team/sql@1.0")
    assert {piece.name for piece in first.missing} == {"w.bin", "sketch", "metrics"}
    assert sync.pull(there, sync.plan_pull(there, remote, "team/sql@1.0"), remote) is False


def test_the_local_name_may_be_another(here, there, remote):
    push(here, "team/sql@1.0", remote)
    plan = pull(there, remote, "team/sql:best", "mine")
    assert str(plan.ref) == "mine@1.0"
    assert there.resolve("mine:best").id == here.resolve("team/sql@1.0").id
    with pytest.raises(InvalidError):
        sync.plan_pull(there, remote, "team/sql", "mine@2.0")


def test_references_mean_the_same_in_a_remote(here, remote):
    push(here, "team/sql@1.0", remote)
    push(here, "team/sql@1.1", remote)
    here.add("team/sql", {"w": b"pre"}, Meaning({}), version="2.0rc1")
    push(here, "team/sql@2.0rc1", remote)
    texts = ["team/sql", "team/sql:latest", "team/sql@1", "team/sql:best", "team/sql@2.0rc1"]
    texts.append(f"team/sql@sha256:{here.resolve('team/sql@1.0').id[:12]}")
    for text in texts:
        assert find(remote, Ref.parse(text)).id == here.resolve(text).id
    for text in ("team/sql@9.0", "team/sql:none", "other", "team/sql@sha256:000000000000"):
        with pytest.raises(NotFoundError) as caught:
            find(remote, Ref.parse(text))
        assert caught.value.hint
    assert remote.names() == ["team/sql"]


def test_two_contents_of_one_number_are_a_conflict_that_changes_nothing(
    here, there, remote, tmp_path
):
    push(here, "team/sql@1.0", remote)
    there.add("team/sql", {"w": b"mine"}, Meaning({}))
    before = sorted((tmp_path / "remote").rglob("*"))
    with pytest.raises(ConflictError, match="diverged"):
        sync.plan_push(there, "team/sql", remote)
    with pytest.raises(ConflictError, match="diverged") as caught:
        sync.plan_pull(there, remote, "team/sql")
    assert "another name" in caught.value.hint
    assert sorted((tmp_path / "remote").rglob("*")) == before
    assert there.files("team/sql")["w"].read_bytes() == b"mine"


def test_equal_numbers_are_one_number(here, there, remote):
    push(here, "team/sql@1.0", remote)
    there.add("team/sql", {"w": b"mine"}, Meaning({}), version="1.0.0")
    with pytest.raises(ConflictError):
        sync.plan_push(there, "team/sql", remote)


def test_whoever_is_first_keeps_the_number(here, there, remote):
    """Both planned before either pushed."""
    there.add("team/sql", {"w": b"mine"}, Meaning({}))
    mine = sync.plan_push(there, "team/sql", remote)
    theirs = sync.plan_push(here, "team/sql@1.0", remote)
    assert sync.push(here, theirs, remote)
    with pytest.raises(ConflictError, match="diverged"):
        sync.push(there, mine, remote)
    assert find(remote, Ref.parse("team/sql@1.0")).id == here.resolve("team/sql@1.0").id


def test_tags_travel_but_move_only_when_named(here, there, remote):
    push(here, "team/sql@1.0", remote)
    here.tag("team/sql@1.1", "best")
    plan = push(here, "team/sql@1.1", remote)
    assert (plan.tags, plan.kept_tags) == (("new",), ("best",))
    assert find(remote, Ref.parse("team/sql:best")).version == "1.0"
    assert push(here, "team/sql:best", remote).tags == ("best",)
    assert find(remote, Ref.parse("team/sql:best")).version == "1.1"

    pull(there, remote, "team/sql@1.1")
    there.add("team/sql", {"w": b"x"}, Meaning({}), tags=["best"])
    plan = pull(there, remote, "team/sql@1.1")
    assert (plan.tags, plan.kept_tags) == ((), ("best",))
    assert pull(there, remote, "team/sql:best").tags == ("best",)
    assert there.resolve("team/sql:best").version == "1.1"


def test_a_tag_must_be_on_the_version_that_is_pushed(here, remote):
    with pytest.raises(InvalidError, match="new"):
        sync.plan_push(here, "team/sql@1.0", remote, tags=["new"])
    assert "best" in sync.plan_push(here, "team/sql@1.0", remote, tags=["best"]).tags


def test_attachments_that_are_added_later_follow(here, there, remote):
    push(here, "team/sql@1.0", remote)
    pull(there, remote, "team/sql@1.0")
    here.attach("team/sql@1.0", "note", b"works well")
    plan = push(here, "team/sql@1.0", remote)
    assert [piece.name for piece in plan.missing] == ["note"]
    pull(there, remote, "team/sql@1.0")
    notes = [a for a in there.attachments("team/sql@1.0") if a.kind == "note"]
    assert [there.read_attachment(note) for note in notes] == [b"works well"]


def test_progress_counts_every_byte(here, there, remote):
    sent, got = [], []
    plan = sync.plan_push(here, "team/sql@1.0", remote)
    sync.push(here, plan, remote, sent.append)
    assert sum(sent) == plan.size > 7000
    plan = sync.plan_pull(there, remote, "team/sql@1.0")
    sync.pull(there, plan, remote, got.append)
    assert sum(got) == plan.size


def test_collecting_in_the_middle_of_a_pull_takes_nothing_of_it(here, there, remote):
    push(here, "team/sql@1.0", remote)
    collected = []
    with Registry(there.home.path) as other:

        def meanwhile(size: int) -> None:
            collected.append(other.gc(timedelta(0)))

        sync.pull(there, sync.plan_pull(there, remote, "team/sql@1.0"), remote, meanwhile)
    assert collected and not any(plan.thrown for plan in collected)
    there.files("team/sql@1.0")
    assert there.verify().damage == ()


def test_nothing_is_recorded_when_the_recheck_refuses(here, there, remote):
    push(here, "team/sql@1.0", remote)
    seen = {}

    def recheck(manifest, files):
        seen.update({path: blob.read_bytes() for path, blob in files.items()})
        raise DamagedError("the manifest says rank 8, the files 4")

    with pytest.raises(DamagedError, match="rank"):
        pull(there, remote, "team/sql@1.0", recheck=recheck)
    assert seen == {"w.bin": b"weights" * 1000, "config.json": b"{}"}
    assert there.list() == []


def test_a_damaged_version_is_not_pushed(here, remote, tmp_path):
    path = here.files("team/sql@1.0")["w.bin"]
    path.chmod(0o644)
    path.write_bytes(b"rotten")
    with pytest.raises(DamagedError, match=r"w\.bin"):
        sync.plan_push(here, "team/sql@1.0", remote)
    assert not (tmp_path / "remote").exists()


def test_a_version_that_was_removed_here_may_be_pulled_again(here, remote):
    push(here, "team/sql@1.0", remote)
    here.rm("team/sql@1.0")
    assert pull(here, remote, "team/sql@1.0").published is False
    assert here.resolve("team/sql@1.0").version == "1.0"


def test_a_place_that_is_no_remote_is_refused(here, there, tmp_path):
    with pytest.raises(UnreachableError):
        sync.plan_pull(there, connect(f"file://{tmp_path}/nowhere"), "team/sql")
    with pytest.raises(InvalidError, match="store"):
        sync.plan_push(here, "team/sql", connect(f"file://{tmp_path}/here"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    with pytest.raises(InvalidError, match=r"1\.jpg"):
        sync.plan_push(here, "team/sql", connect(f"file://{tmp_path}/photos"))
    with pytest.raises(NotFoundError, match="s3"):
        connect("s3://bucket/prefix")


def test_a_full_disk_there_is_a_failure_of_the_remote(here, remote, faults):
    def full(number, name):
        if name == "write":
            raise OSError(28, "No space left on device")

    remote.blobs.files = faults.Counting(full)
    with pytest.raises(RemoteError, match="No space left"):
        push(here, "team/sql", remote)


def test_a_yank_travels_both_ways_and_what_was_said_last_holds(here, there, remote):
    push(here, "team/sql@1.0", remote), push(here, "team/sql@1.1", remote)
    pull(there, remote, "team/sql@1.1")
    here.yank("team/sql@1.1", "wrong data")
    assert push(here, "team/sql@1.1", remote).yank.reason == "wrong data"
    assert push(here, "team/sql@1.1", remote).is_done
    assert find(remote, Ref.parse("team/sql")).version == "1.0"  # as it is here
    assert there.resolve("team/sql@1.1").yanked is None
    assert pull(there, remote, "team/sql@1.1").yank.yanked
    assert there.resolve("team/sql@1.1").yanked == "wrong data"
    assert pull(there, remote, "team/sql@1.1").is_done
    assert push(there, "team/sql@1.1", remote).is_done

    here.unyank("team/sql@1.1")  # said later than the yank, though before `there` heard of it again
    push(here, "team/sql@1.1", remote)
    assert pull(there, remote, "team/sql@1.1").yank == here.yank_of("team/sql@1.1")
    assert there.resolve("team/sql@1.1").yanked is None
    there.yank("team/sql@1.1", "even so")
    assert pull(there, remote, "team/sql@1.1").yank is None  # older than that
    assert push(there, "team/sql@1.1", remote).yank.reason == "even so"
    assert pull(here, remote, "team/sql@1.1").yank.reason == "even so"


def test_a_yank_outlives_a_rebuild_and_a_removal(here, there, remote):
    here.yank("team/sql@1.0", "bad")
    push(here, "team/sql@1.0", remote)
    pull(there, remote, "team/sql@1.0")
    said = there.yank_of("team/sql@1.0")
    assert said == here.yank_of("team/sql@1.0")
    there.rebuild()
    assert there.yank_of("team/sql@1.0") == said and there.verify().damage == ()
    there.rm("team/sql@1.0")
    pull(there, remote, "team/sql@1.0")
    assert there.resolve("team/sql@1.0").yanked == "bad"


def test_a_name_that_was_changed_leads_to_the_new_one_there_too(here, there, remote):
    push(here, "team/sql@1.0", remote)
    here.mv("team/sql", "team/query")
    plan = push(here, "team/query@1.1", remote)
    assert plan.former == ("team/sql",) and push(here, "team/query@1.1", remote).is_done
    assert find(remote, Ref.parse("team/sql")).ref == Ref.parse("team/query@1.1")
    assert find(remote, Ref.parse("team/sql@1.0")).name == "team/sql"  # only pushed under that
    assert remote.names() == ["team/query", "team/sql"]
    assert str(pull(there, remote, "team/sql").ref) == "team/query@1.1"
    assert there.resolve("team/sql").ref == there.resolve("team/query").ref
    there.rebuild()
    assert there.resolve("team/sql").name == "team/query" and there.verify().damage == ()
    assert pull(there, remote, "team/sql").is_done


def test_a_name_that_is_in_use_here_does_not_become_another(here, there, remote):
    there.add("team/sql", {"w": b"mine"}, Meaning({}))
    here.mv("team/sql", "team/query")
    push(here, "team/query@1.0", remote)
    plan = pull(there, remote, "team/sql")
    assert (plan.former, plan.kept_name) == ((), "team/sql")
    assert there.files("team/sql").keys() == {"w"}
    assert pull(there, remote, "team/sql", "other").kept_name == ""


def test_protection_stays_where_it_was_given(here, there, remote):
    here.protect("team/sql:best")
    push(here, "team/sql@1.0", remote)
    pull(there, remote, "team/sql@1.0")
    there.untag("team/sql:best")


def test_aliases(here, remote, tmp_path):
    url = f"file://{tmp_path}/remote"
    assert aliases.add(here, "disk", f"{url}/") == url
    aliases.add(here, "disk", url)
    assert aliases.list(here) == {"disk": url}
    assert connect("disk", here).url == connect("disk#sql", here).url == url
    with pytest.raises(ConflictError):
        aliases.add(here, "disk", "file:///elsewhere")
    with pytest.raises(InvalidError, match="credentials") as caught:
        aliases.add(here, "hub", "hf+https://me:hunter2@hub.example.com")
    assert "hunter2" not in str(caught.value)
    for bad in ("a b", "a#b", "file:///x", ""):
        with pytest.raises(InvalidError):
            aliases.add(here, bad, url)
    with Registry(tmp_path / "here") as again:
        assert aliases.rm(again, "disk") == url
    with pytest.raises(NotFoundError, match="disk"):
        connect("disk", here)
    with pytest.raises(NotFoundError):
        aliases.rm(here, "disk")
    with pytest.raises(InvalidError):
        connect("disk")
