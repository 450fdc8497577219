"""Two trees take turns, each in a process that imports that tree's package."""

import pytest

from benchmarks import against
from benchmarks.__main__ import main


def test_a_tree_against_itself(capfd):
    assert main(["against", "--turns", "1"]) == 0
    where, also, _, *rows = capfd.readouterr().out.splitlines()
    assert where.removeprefix("other: ") == also.removeprefix("this: ") == str(against.ROOT / "rdp_kernels/__init__.py")
    assert len(rows) == 10 * len(against.PASSES)
    for row in rows:
        other, this, ratio = map(float, row.split()[-3:])
        assert ratio == pytest.approx(this / other, abs=0.01)


def test_each_process_has_its_own_tree(tmp_path, capfd):
    (tmp_path / "rdp_kernels").symlink_to(against.ROOT / "rdp_kernels")
    assert main(["against", str(tmp_path), "--turns", "1"]) == 0
    assert f"other: {tmp_path / 'rdp_kernels'}" in capfd.readouterr().out


def test_a_folder_without_the_package(tmp_path, capfd):
    assert main(["against", str(tmp_path)]) == 2
    assert f"{tmp_path} has no rdp_kernels" in capfd.readouterr().err
