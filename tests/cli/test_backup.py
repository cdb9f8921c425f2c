"""adapter backup, adapter restore, adapter upgrade"""

from __future__ import annotations


def test_a_backup_brings_everything_back(run, run_json, stored, tmp_path):
    saved = tmp_path / "saved"
    said = run("backup", saved).stdout
    assert said.startswith(f"{saved}: 1 version, ") and said.endswith("KiB\n")
    home = tmp_path / "new"
    said = run("--home", home, "restore", saved).stdout
    assert said.startswith(f"{home}: 1 version, ")
    assert run_json("--home", home, "show", "sql") == run_json("show", "sql")
    assert "not empty" in run("--home", home, "restore", saved, code=4).stderr
    assert "exists" in run("backup", saved, code=4).stderr


def test_a_damaged_backup_is_refused(run, stored, tmp_path):
    saved = tmp_path / "saved"
    run("backup", saved)
    saved.write_bytes(saved.read_bytes()[:-10])
    assert "saved" in run("--home", tmp_path / "new", "restore", saved, code=5).stderr
    run("--home", tmp_path / "new", "restore", tmp_path / "none", code=1)
    assert run("--home", tmp_path / "new", "list").stdout.splitlines()[1:] == []


def test_the_newest_format_needs_no_upgrade(run, stored, tmp_path):
    assert run("upgrade").stdout.endswith("has format 1, the newest\n")
    run("--home", tmp_path / "none", "upgrade", code=3)
