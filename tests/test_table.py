"""The tables in reports are text, wherever they are made."""

import pytest
import rich.console

from rdp_kernels._utils.table import table

CELLS = (("name", "p"), [("blocks.0", "0.25"), ("blocks.1", "0.5")])


@pytest.mark.parametrize("in_a_notebook", [False, True])
def test_a_table_has_its_cells(monkeypatch, in_a_notebook):
    """In a notebook rich displays its output at once instead of writing it to the given file."""
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: in_a_notebook)
    text = "\n".join(table(*CELLS))
    assert all(cell in text for row in (CELLS[0], *CELLS[1]) for cell in row)


def test_without_rows_there_is_no_table():
    assert table(("name",), []) == []
