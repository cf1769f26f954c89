"""CONTRIBUTING.md: its worked example runs as it is printed there, and the files it names exist."""
import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from forcing_pack.forcing_core import policies
from forcing_pack.forcing_core.plan_view import announce

pytestmark = pytest.mark.usefixtures("one_thread")

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
# path -> the block of code under it
BLOCKS = dict(re.findall(r"^\*\*`(\S+)`\*\*[^\n]*\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
POLICY, TABLE, TEST = "forcing_core/policies/strided.py", "forcing_core/policies/__init__.py", "tests/unit/test_strided.py"
NAMES = re.findall(r"^def (test_\w+)", BLOCKS[TEST], re.MULTILINE)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(path): the block of that path as a module, under the name that it would have in the pack."""
    def load(path):
        name = ".".join(["forcing_pack", *Path(path).with_suffix("").parts])
        file = tmp_path / Path(path).name
        file.write_text(BLOCKS[path], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def strided(load, monkeypatch):
    """The module of the policy, its row in KINDS."""
    module = load(POLICY)
    added = [line.removeprefix("+") for line in BLOCKS[TABLE].splitlines()]
    (imported, *_), row = ast.parse(added[0]).body, ast.parse("{" + added[1].strip() + "}", mode="eval").body
    assert imported.level == 1 and f"{imported.module}.py" == Path(POLICY).name
    names = [part.id for part in row.values[0].elts]
    assert sorted(names) == sorted(alias.name for alias in imported.names)
    monkeypatch.setitem(policies.KINDS, row.keys[0].value, tuple(getattr(module, name) for name in names))
    return module


def test_the_page_has_the_three_blocks():
    assert list(BLOCKS) == [POLICY, TABLE, TEST] and len(NAMES) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_tests_of_the_example_pass(strided, load, name):
    getattr(load(TEST), name)()


def test_the_row_is_all_that_a_rollout_needs(strided):
    """Found by its options, and announced as a plain store of one window."""
    options = strided.StridedOptions()
    assert type(policies.build(options, 60)) is strided.Strided
    plain = policies.WindowOptions(window=21, sink=3, positions="relative")
    assert announce(options, 60).bytes == announce(plain, 60).bytes


def test_the_files_it_names_exist():
    named = set(re.findall(r"`((?:forcing_core|nodes|tests|web)/[\w/.]*)`", PAGE)) - {POLICY, TEST}
    assert len(named) > 8 and [path for path in sorted(named) if not (REPO / path).exists()] == []
    code = [line for block in BLOCKS.values() for line in block.splitlines()]
    assert max(map(len, code)) <= 128
