"""The one parser of references and URLs."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.registry.errors import AdapterError, InvalidError, NotFoundError
from adapterkit.registry.refs import (
    PathSource,
    Ref,
    UrlSource,
    parse_base,
    parse_remote,
    parse_source,
    split_weight,
)
from adapterkit.registry.urls import Url, parse_url

HEX = "0123456789ab"
LONG = "a" * 64

GOOD = [
    ("sql", Ref("local", "sql")),
    ("local/sql", Ref("local", "sql")),
    ("team/sql", Ref("team", "sql")),
    ("Team_1/sql.v2-x", Ref("Team_1", "sql.v2-x")),
    ("sql@1.0", Ref("local", "sql", version="1.0")),
    ("sql@1", Ref("local", "sql", version="1")),
    ("team/sql@1.2.3", Ref("team", "sql", version="1.2.3")),
    ("sql@v2", Ref("local", "sql", version="2")),
    ("sql@2.0-RC.1", Ref("local", "sql", version="2.0rc1")),
    ("sql@1.0.post3", Ref("local", "sql", version="1.0.post3")),
    ("sql@1.0.dev4", Ref("local", "sql", version="1.0.dev4")),
    ("sql:best", Ref("local", "sql", tag="best")),
    ("sql:latest", Ref("local", "sql", tag="latest")),
    ("team/sql:prod-eu_1.x", Ref("team", "sql", tag="prod-eu_1.x")),
    (f"sql@sha256:{HEX}", Ref("local", "sql", digest=HEX)),
    (f"sql@sha256:{HEX.upper()}", Ref("local", "sql", digest=HEX)),
    (f"team/sql@sha256:{LONG}", Ref("team", "sql", digest=LONG)),
    ("c:tag", Ref("local", "c", tag="tag")),
    ("models/sql", Ref("models", "sql")),
    (".", PathSource(Path())),
    ("..", PathSource(Path(".."))),
    ("./sql", PathSource(Path("sql"))),
    ("./team/sql@1.0", PathSource(Path("team/sql@1.0"))),
    ("../sql", PathSource(Path("../sql"))),
    ("/srv/sql", PathSource(Path("/srv/sql"))),
    ("/srv/a b#c", PathSource(Path("/srv/a b#c"))),
    (".\\sql", PathSource(Path(".\\sql"))),
    ("..\\sql", PathSource(Path("..\\sql"))),
    ("C:\\models\\sql", PathSource(Path("C:\\models\\sql"))),
    ("C:/models/sql", PathSource(Path("C:/models/sql"))),
    ("z:\\", PathSource(Path("z:\\"))),
    ("file:///srv/store#sql", UrlSource("file:///srv/store", Ref("local", "sql"))),
    ("file:///srv/store/#team/sql@1.0", UrlSource("file:///srv/store", Ref.parse("team/sql@1.0"))),
    ("file://localhost/srv#sql:best", UrlSource("file:///srv", Ref.parse("sql:best"))),
    ("FILE:///srv#sql", UrlSource("file:///srv", Ref("local", "sql"))),
    ("file:///a b#sql", UrlSource("file:///a b", Ref("local", "sql"))),
    ("file:///a%20b%23%25#sql", UrlSource("file:///a b%23%25", Ref("local", "sql"))),
    ("file:///C:/store#sql", UrlSource("file:///C:/store", Ref("local", "sql"))),
    ("s3://bucket/pre/fix#sql", UrlSource("s3://bucket/pre/fix", Ref("local", "sql"))),
    ("s3://bucket#sql", UrlSource("s3://bucket", Ref("local", "sql"))),
    ("hf://org/name", UrlSource("hf://org/name")),
    ("hf://org/name@main", UrlSource("hf://org/name@main")),
    ("hf://org/name@refs/pr/1", UrlSource("hf://org/name@refs/pr/1")),
    ("hf+https://hub.acme.com/org/name", UrlSource("hf+https://hub.acme.com/org/name")),
    ("hf+https://Hub:8443/org/name@v1", UrlSource("hf+https://hub:8443/org/name@v1")),
    ("hf+http://localhost:8000/org/name", UrlSource("hf+http://localhost:8000/org/name")),
    ("hf+http://127.0.0.1:80/org/name", UrlSource("hf+http://127.0.0.1:80/org/name")),
    ("hf+http://[::1]:80/org/name", UrlSource("hf+http://[::1]:80/org/name")),
    ("hf+https://hub.acme.com#sql@1.0", UrlSource("hf+https://hub.acme.com", Ref.parse("sql@1.0"))),
    ("hf+https://hub.acme.com/#sql", UrlSource("hf+https://hub.acme.com", Ref("local", "sql"))),
    ("oci://ghcr.io/acme/sql", UrlSource("oci://ghcr.io/acme/sql")),
    ("oci://localhost:5000/sql:v1", UrlSource("oci://localhost:5000/sql:v1")),
    (f"oci://h/sql@sha256:{LONG}", UrlSource(f"oci://h/sql@sha256:{LONG}")),
    (f"oci://h/sql:v1@sha256:{LONG}", UrlSource(f"oci://h/sql:v1@sha256:{LONG}")),
    ("team#sql", UrlSource("team", Ref("local", "sql"))),
    ("team#org/sql:best", UrlSource("team", Ref.parse("org/sql:best"))),
]  # fmt: skip

BAD = [
    "", " ", "a/b/c", "/".join(["a"] * 4), "-sql", "sql-", "a--b", "a..b", ".hidden", "x.git",
    "sql@", "sql:", "sql@1!2.0", "sql@1.0+local", "sql@latest", "sql@1.0:tag", "sql:1.0", "sql:v1",
    "sql:a b", "sql@sha256:abc", f"sql@sha256:{LONG}0", "sql@sha256:xyzxyzxyzxyz", "@1.0", ":tag",
    "sql/", "/\0", "a" * 97, "sql@" + "9" * 5000, "sql\n", "sqľ", "team#", "#sql", "-a#sql",
    "file:///srv", "file://srv/x#sql", "file:relative#sql", "s3://b#sql", "s3://bucket/../x#sql",
    "s3://bucket", "hf://org/name#sql", "hf://tok@org/name", "hf://org/name@", "hf://org/name@a..b",
    "hf+https://user:secret@host/org/name", "hf+http://hub.acme.com/org/name", "hf+https://host/a/b/c",
    "hf+https://host/name", "hf+https://host#", "hf+https://host", "oci://host", "oci://host/UPPER",
    "oci://host/a:b:c", "hf://org/name?x=1", "://x", "hf://", "file://", "file:///a%0Ab#sql", "file:///a%00b#sql",
]  # fmt: skip


def test_the_tables_are_long_enough():
    assert len(GOOD) + len(BAD) >= 100


@pytest.mark.parametrize(("text", "expected"), GOOD, ids=[text for text, _ in GOOD])
def test_good_sources(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize(("text", "expected"), GOOD, ids=[text for text, _ in GOOD])
def test_what_is_printed_parses_to_the_same(text, expected):
    found = parse_source(text)
    assert parse_source(str(found)) == found


@pytest.mark.parametrize("text", BAD, ids=[text[:30] for text in BAD])
def test_bad_sources_are_invalid(text):
    with pytest.raises(InvalidError):
        parse_source(text)


@pytest.mark.parametrize("url", ["ftp://x/y", "https://huggingface.co/org/name", "http://x"])
def test_an_unknown_scheme_is_not_found_and_is_named(url):
    with pytest.raises(NotFoundError, match=url.split(":")[0]):
        parse_source(url)


def test_credentials_are_not_repeated():
    for url in ("hf+https://user:hunter2@host/org/name", "s3://key:hunter2@bucket/x#sql"):
        with pytest.raises(InvalidError) as caught:
            parse_source(url)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_the_home_folder_is_expanded():
    assert parse_source("~/sql") == PathSource(Path.home() / "sql")


def test_a_folder_of_the_same_name_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "sql").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_source("sql") == Ref("local", "sql")


def test_local_is_left_out_when_printed():
    assert str(Ref.parse("local/sql@1.0")) == "sql@1.0"
    assert Ref.parse("sql").full_name == "local/sql"
    assert str(Ref.parse("team/sql")) == "team/sql"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Url("hf", path="org/name")),
        ("org/name@main", Url("hf", path="org/name", revision="main")),
        ("gpt2", Url("hf", path="gpt2")),
        ("hf://org/name@v1", Url("hf", path="org/name", revision="v1")),
        ("hf+https://host/org/name", Url("hf+https", "host", "org/name")),
        ("./org/name", PathSource(Path("org/name"))),
        ("file:///srv/base", PathSource(Path("/srv/base"))),
        ("C:\\base", PathSource(Path("C:\\base"))),
    ],
)
def test_bases(text, expected):
    found = parse_base(text)
    assert found == expected
    assert parse_base(str(found)) == found


@pytest.mark.parametrize("text", ["gpt2@main", "s3://bucket/x", "a/b/c", "hf+https://host", ""])
def test_bad_bases(text):
    with pytest.raises(InvalidError):
        parse_base(text)


def test_a_remote_may_stand_without_a_name():
    assert parse_remote("team") == UrlSource("team")
    assert parse_remote("file:///srv") == UrlSource("file:///srv")
    assert parse_url("file:///a%3Fb").path == "/a?b"


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("a=0.5", "a", 0.5),
        ("a", "a", None),
        ("a=b=-2", "a=b", -2.0),
        ("a=1e-3", "a", 0.001),
        ("a=.5", "a", 0.5),
        ("a=+1.", "a", 1.0),
        ("a=", "a=", None),
        ("a=nan", "a=nan", None),
        ("a=inf", "a=inf", None),
        ("a=1e999", "a=1e999", None),
        ("a=1_0", "a=1_0", None),
        ("a=x", "a=x", None),
        ("./k=v/a", "./k=v/a", None),
        ("=0.5", "=0.5", None),
        ("a=٣", "a=٣", None),
    ],
)
def test_weights(text, source, weight):
    assert split_weight(text) == (source, weight)


segment = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=12)
versions = st.from_regex(
    r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}((a|b|rc)[0-9])?(\.post[0-9])?", fullmatch=True
)


@given(
    segment, segment, st.one_of(versions.map("@{}".format), segment.map(":{}".format), st.just(""))
)
def test_references_round_trip(namespace, name, rest):
    try:
        ref = Ref.parse(f"{namespace}/{name}{rest}")
    except InvalidError:
        return
    assert Ref.parse(str(ref)) == ref


@given(st.text())
def test_any_text_parses_or_is_refused(text):
    try:
        found = parse_source(text)
    except AdapterError:
        return
    assert parse_source(str(found)) == found
