"""The table of planted faults follows the code: `tests/mutation_check.py` runs it."""

import ast
from pathlib import Path

import mutation_check
import pytest


@pytest.mark.parametrize("mutation", mutation_check.MUTATIONS, ids=lambda m: m.name)
def test_a_planted_fault_is_not_stale(mutation):
    text = (mutation_check.ROOT / "octolike" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, "update old and new in tests/mutation_check.py"
    changed = text.replace(mutation.old, mutation.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert (Path(__file__).parent / mutation.test).is_file()


def test_every_fault_has_its_own_name():
    names = [mutation.name for mutation in mutation_check.MUTATIONS]
    assert len(names) == len(set(names)) >= 20
