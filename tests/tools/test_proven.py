"""What spares the longest tests: the hash of all that they read."""

import shutil
from pathlib import Path

import proven


def test_each_names_a_file_and_sources_that_are_there() -> None:
    for file, sources in proven.PROVEN.items():
        assert "pytest.mark.slow" in (proven.ROOT / file).read_text("utf-8")
        for source in sources:
            assert (proven.ROOT / source).exists(), source


def test_a_change_of_anything_that_is_read_is_seen(tmp_path: Path) -> None:
    file = "tests/ops/test_triton_steps.py"
    for place in (file, *proven.PROVEN[file]):
        copied, target = proven.ROOT / place, tmp_path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if copied.is_dir():
            shutil.copytree(copied, target, dirs_exist_ok=True)
        else:
            shutil.copy(copied, target)
    before = proven.digest(file, tmp_path)
    assert before == proven.digest(file)
    seen = {before}
    for place in (file, "src/topwork/ops/triton/norm.py", "tests/reference/measure.py", "constraints.txt"):
        with open(tmp_path / place, "a", encoding="utf-8") as changed:
            changed.write("\n")
        seen.add(proven.digest(file, tmp_path))
    (tmp_path / "src/topwork/ops/native/new.c").write_text("")
    seen.add(proven.digest(file, tmp_path))
    assert len(seen) == 6


def test_what_was_never_proven_runs(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(proven, "RECORD", tmp_path / "proven.json")
    assert not any(proven.is_proven(file) for file in proven.PROVEN)
    proven.RECORD.write_text('{"tests/ops/test_triton_steps.py": "another"}')
    assert not proven.is_proven("tests/ops/test_triton_steps.py")
