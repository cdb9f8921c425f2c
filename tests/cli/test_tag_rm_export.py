"""adapter tag, adapter rm, adapter export"""

from __future__ import annotations

import filecmp


def test_a_tag_moves_and_says_from_where(run, stored, sql):
    run("add", sql, "sql@2.0", "--base", "", code=2)
    run("add", sql, "sql@2.0", "--trained-on", "int8")
    assert run("tag", "sql@2.0", "prod").stdout == "sql:prod is 2.0, before 1.0\n"
    assert run("tag", "sql@2.0", "prod").stdout == "sql:prod is 2.0\n"


def test_a_tag_goes_and_the_version_stays(run, run_json, stored):
    assert run("rm", "sql:prod").stdout == "removed the tag sql:prod\n"
    assert run_json("show", "sql")["tags"] == []


def test_a_removed_version_is_gone_for_good(run, stored, sql):
    assert run("rm", "sql@1.0").stdout == "removed sql@1.0\n"
    assert "was removed" in run("show", "sql@1.0", code=3).stderr
    assert run("add", sql, "sql").stdout.startswith("sql@1.1: ")


def test_a_name_with_several_versions_is_not_removed(run, stored, sql):
    run("add", sql, "sql", "--trained-on", "int8")
    assert "sql has 2 versions: 1.0, 1.1" in run("rm", "sql", code=2).stderr


def test_an_export_is_the_folder_that_was_added(run, stored, sql, tmp_path):
    shown = run("export", "sql", tmp_path / "out").stdout
    assert shown == f"sql@1.0: 2 files, 16.1 KiB in {tmp_path / 'out'}\n"
    same = filecmp.dircmp(sql, tmp_path / "out")
    assert (same.left_only, same.right_only, same.diff_files) == ([], [], [])


def test_an_export_never_writes_over_anything(run, stored, tmp_path):
    (tmp_path / "mine").write_text("x")
    assert "is not empty" in run("export", "sql", tmp_path, code=4).stderr
