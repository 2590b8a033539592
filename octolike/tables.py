"""Tables of text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(
    rows: Iterable[Sequence[object]],
    headers: Sequence[str] = (),
    align: str = "l",
    indent: int = 0,
) -> str:
    """Return rows as aligned columns of text, two spaces apart, without rules.

    Args:
        rows: cells; each is formatted with `str`.
        headers: column titles, aligned like their columns.
        align: "l", "r" or "c" per column; the last letter also holds for all further columns.
        indent: spaces before each line.
    """
    # As a row: tabulate makes a column with a header two characters wider than its cells.
    cells = [headers, *rows] if headers else rows
    lines = _tabulate(cells, (), align, "plain").splitlines()
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def markdown_table(
    rows: Iterable[Sequence[object]], headers: Sequence[str], align: str = "l"
) -> str:
    """Return a Markdown table (GitHub's dialect); vertical bars in cells are escaped.

    rows, headers, align: as in `text_table`.
    """
    escaped = ([str(cell).replace("|", r"\|") for cell in row] for row in rows)
    return _tabulate(escaped, [h.replace("|", r"\|") for h in headers], align, "pipe")


def _tabulate(
    rows: Iterable[Sequence[object]], headers: Sequence[str], align: str, style: str
) -> str:
    from tabulate import tabulate

    # A name from a dataset may hold line breaks, which would end the row.
    cells = [[" ".join(str(cell).splitlines()) for cell in row] for row in rows]
    width = max(map(len, [headers, *cells]))
    names = {"l": "left", "r": "right", "c": "center"}
    columns = [names[letter] for letter in align.ljust(width, align[-1])[:width]]
    # Cells are formatted by the caller: tabulate must not read numbers out of them.
    return tabulate(cells, headers, tablefmt=style, colalign=columns, disable_numparse=True)
