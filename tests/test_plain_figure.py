"""No text can break a figure: names and instructions are shown as they are."""

import json
from pathlib import Path

import numpy as np
import pytest

from octolike.data.onboarding import survey_figures
from octolike.data.pipeline import learned_mix
from octolike.evaluation import figures
from octolike.plain_figure import PlainFigure
from octolike.train import chunk_figures
from octolike.train.chunk_figures import ActionChunk

BROKEN = r"$\bogus{$"


def texts(figure, path):
    """Return the texts that are parsed as TeX, after drawing."""
    figure.savefig(path)
    parsed = [t for t in figure.findobj(lambda x: hasattr(x, "get_parse_math")) if t.get_text()]
    return {t.get_text() for t in parsed if t.get_parse_math()}


def test_titles_labels_and_categories_are_not_parsed(tmp_path):
    figure = PlainFigure()
    axes = figure.subplots()
    axes.barh([BROKEN, "other"], [1, 1000], label=BROKEN)
    axes.set_xscale("log")
    axes.set_title(BROKEN)
    axes.set_xlabel(BROKEN)
    axes.annotate(BROKEN, (1, 0))
    axes.legend()
    figure.suptitle(BROKEN)
    assert BROKEN not in texts(figure, tmp_path / "a.png")
    assert any(
        "mathdefault" in text for text in texts(figure, tmp_path / "a.png")
    )  # powers of ten stay


def test_the_figures_of_octolike_draw_any_name(tmp_path):
    values = np.zeros((3, 1), np.float32)
    chunk = ActionChunk(values, values, (BROKEN,), (BROKEN,), (BROKEN, BROKEN, BROKEN))
    assert chunk_figures.save_figure([chunk], 1, tmp_path).exists()
    figure, (axes,) = figures.new(3, 2, 1)
    axes.set_title(BROKEN)
    assert figures.save(figure, tmp_path / "b.png").exists()
    learned_mix.write_mix({BROKEN: 0.5, "other": 0.5}, tmp_path)
    assert json.loads((tmp_path / "mix.json").read_text())[BROKEN] == 0.5
    assert (tmp_path / "mix.png").exists()


@pytest.mark.parametrize("module", [figures, survey_figures, chunk_figures])
def test_every_module_of_figures_uses_plain_figures(module):
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert " Figure(" not in source.replace("-> Figure", "")
    assert "PlainFigure(" in source
