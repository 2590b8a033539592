"""A matplotlib figure that shows every text as it is.

Instructions, datasets and dimensions may have any name; matplotlib would read text between two
dollar signs as TeX, and fail to draw the figure if it is not. Every figure of octolike is a
`PlainFigure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, ScalarFormatter


class PlainFigure(Figure):
    """A figure with texts that are never parsed as TeX, however they were added."""

    def draw(self, renderer: Any) -> None:
        """Draw the figure: called by savefig, and by notebooks."""
        numbers = {id(text) for text in self._tick_numbers()}
        for text in self.findobj(Text):
            if id(text) not in numbers:
                text.set_parse_math(False)
        super().draw(renderer)

    def _tick_numbers(self) -> Iterator[Text]:
        """Yield the tick labels that matplotlib writes as powers of ten, in TeX."""
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                # get_ticklabels creates the labels that drawing would create.
                for formatter, labels in (
                    (axis.get_major_formatter(), axis.get_ticklabels()),
                    (axis.get_minor_formatter(), axis.get_ticklabels(minor=True)),
                ):
                    if isinstance(formatter, (LogFormatter, ScalarFormatter)):
                        yield from labels
                yield axis.get_offset_text()
