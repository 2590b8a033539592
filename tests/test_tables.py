"""Tables of text and of Markdown."""

from octolike.tables import markdown_table, text_table


def test_text_columns_are_aligned_and_numbers_stay_as_formatted():
    rows = [("touch", "1.50", "000"), ("put", "12", "")]
    assert text_table(rows, ("skill", "steps", "id"), "lr", indent=2).splitlines() == [
        "  skill  steps   id",
        "  touch   1.50  000",
        "  put       12",
    ]
    assert text_table([("a", 1), ("bb", 23)], align="rl") == " a  1\nbb  23"
    assert text_table([], ("skill", "steps")) == "skill  steps"


def test_markdown_bars_in_cells_are_escaped():
    head, rule, line = markdown_table([("a|b", 0.5)], ("variant", "mean"), "lr").splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["variant", "mean"]
    assert set(rule) == set("|:-")
    assert r"| a\|b" in line


def test_line_breaks_in_a_cell_do_not_end_its_row():
    assert text_table([["a\nb", "c"]]) == "a b  c"
