"""Files import in one direction: no circle anywhere, imports for types alone counted too.

The walk is over `ast`, so that nothing is run, and nothing is left out for what a folder is called.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
import rooms

ROOT = Path(__file__).parents[2]
# Folders, and where the names of their modules begin.
TREES = {"tnpeft": ROOT, "examples": ROOT / "examples", "benchmarks": ROOT / "benchmarks"}
# The driver: each file imports its own wing and those to the left. The package itself imports none.
WINGS = ("support", "config", "data", "model", "sampling", "evaluation", "training", "study", "searching")


def import_graph(folder: Path, root: Path) -> networkx.DiGraph[str]:
    """Each module of a folder, with an arrow to every module of it that the file names in an import."""
    files = {module_name(path, root): path for path in sorted(folder.rglob("*.py"))}
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(files)
    for name, path in files.items():
        for module, attribute in imports(path):
            target = f"{module}.{attribute}" if f"{module}.{attribute}" in files else module
            if target in files and target != name:
                graph.add_edge(name, target)
    return graph


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[tuple[str, str]]:
    """The modules that a file imports, each with a name in it or none; in functions and under TYPE_CHECKING too."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def circles(graph: networkx.DiGraph[str]) -> list[set[str]]:
    return [circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]


@pytest.mark.parametrize("tree", TREES)
def test_no_files_import_each_other(tree: str):
    found = circles(import_graph(ROOT / tree, TREES[tree]))
    assert found == []


def test_the_wings_of_the_driver_have_one_order():
    graph = import_graph(ROOT / "examples", TREES["examples"])
    assert {wing_of(name) for name in graph} - {None} == {"", *WINGS}
    upward = [f"{file} -> {other}" for file, other in graph.edges if not may_import(wing_of(file), wing_of(other))]
    assert upward == []


def test_the_texts_have_the_wings_in_their_order():
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").partition("## The code")[2]
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+\.py)` \|$", table, re.MULTILINE)
    assert [wing for wing, _ in rows] == [*WINGS]
    assert all((ROOT / "examples" / "ddpm_lab" / wing / file).is_file() for wing, file in rows)
    for text in ("CONTRIBUTING.md", "examples/ddpm_lab/__init__.py"):
        assert " <- ".join(WINGS) in (ROOT / text).read_text(encoding="utf-8")


def wing_of(module: str) -> str | None:
    """`support` for `ddpm_lab.support.faults`, nothing for `ddpm_lab` itself; None outside the driver."""
    package, _, inner = module.partition(".")
    return inner.partition(".")[0] if package == "ddpm_lab" else None


def may_import(wing: str | None, other: str | None) -> bool:
    if wing is None:  # a script imports what it needs
        return True
    return other in WINGS and wing in WINGS and WINGS.index(other) <= WINGS.index(wing)


@pytest.mark.parametrize(
    ("file", "other", "allowed"),
    [
        ("ddpm", "ddpm_lab.study.study", True),
        ("ddpm_lab.study.run", "ddpm_lab.training.driver", True),
        ("ddpm_lab.model.unet", "ddpm_lab.model.base_file", True),
        ("ddpm_lab.model.unet", "ddpm_lab.model", True),
        ("ddpm_lab.model.unet", "ddpm_lab.sampling.draw", False),
        ("ddpm_lab.model.unet", "ddpm_lab", False),
        ("ddpm_lab.model.unet", "ddpm", False),
        ("ddpm_lab", "ddpm_lab.support.faults", False),
    ],
)
def test_wings_import_downwards_alone(file: str, other: str, allowed: bool):
    assert may_import(wing_of(file), wing_of(other)) is allowed


def test_the_walk_sees_every_kind_of_import(tmp_path: Path):
    files = {
        "a/__init__.py": "from a.b import x\n",
        "a/b.py": "def f():\n    import a.spec.c\n",
        "a/spec/__init__.py": "",
        "a/spec/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import d\n",
        "a/d.py": "from a.spec import c\nfrom a import e as f\n",
        "a/e.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = import_graph(tmp_path / "a", tmp_path)
    assert [*graph["a.d"]] == ["a.e", "a.spec.c"] or [*graph["a.d"]] == ["a.spec.c", "a.e"]
    assert sorted(graph) == ["a", "a.b", "a.d", "a.e", "a.spec", "a.spec.c"]
    assert circles(graph) == [{"a.d", "a.spec.c"}]


def test_the_picture_of_the_rooms_is_current():
    counts = rooms.imports_between_rooms()
    drawn = rooms.drawn(counts, rooms.order(counts))
    assert rooms.PICTURE.read_text(encoding="utf-8") == drawn, "run `python benchmarks/rooms.py`"


def test_a_room_stands_after_those_that_it_imports():
    counts = Counter({("c", "a"): 1, ("b", "c"): 2, ("d", "b"): 1})
    assert rooms.order(counts) == ["a", "c", "b", "d"]
    assert 'class="up"' not in rooms.drawn(counts, ["a", "c", "b", "d"])
    assert "1 file of c imports a" in rooms.drawn(counts, ["a", "c", "b", "d"])
    assert rooms.drawn(counts, ["c", "a", "b", "d"]).count('class="up"') == 1


# What a function may import: the start of the file, the start of the module, and why not at the top.
LATE = (
    ("tnpeft/cli/", "tnpeft.", "a command loads the rooms that it needs"),
    ("tnpeft/cli/", "torch", "commands that need no model start without it"),
    ("tnpeft/network/signature.py", "torch", "only who has a module pays for it"),
    ("tnpeft/draw/", "matplotlib", "an extra"),
    ("tnpeft/searching/", "tnpeft.searching.", "it needs Optuna, an extra"),
    ("tnpeft/searching/results.py", "optuna", "an extra"),
    ("tnpeft/planning/heuristic.py", "cotengra", "20 ms, which only large networks pay"),
    ("tnpeft/adapters/memory_need.py", "resource", "Windows has none"),
    ("tnpeft/adapters/distributed.py", "torch.distributed", "a second; whoever has a DTensor has paid for it"),
    ("tnpeft/adapters/units.py", "torch.distributed", "a second; whoever has a DTensor has paid for it"),
)

# Which files import a module by a name that is put together, which no walk over `ast` sees, and why.
BY_NAME = {
    "tnpeft/__init__.py": "a room loads when a name of its is asked for",
    "tnpeft/recipe/__init__.py": "reading a recipe takes no torch",
    "tnpeft/recipe/handle.py": "methods for what files and fits do, which know handles and stand above them",
    "tnpeft/earlier.py": "where classes of earlier pickles are now",
    "tnpeft/cli/models.py": "the user says where a model is made",
}


def test_what_is_imported_by_name_has_a_reason():
    by_name = {
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tnpeft").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "import_module"
    }
    assert by_name == {*BY_NAME}


def test_what_a_function_imports_has_a_reason():
    late = {
        (path.relative_to(ROOT).as_posix(), module)
        for path in sorted((ROOT / "tnpeft").rglob("*.py"))
        for module in late_imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    allowed = {
        (file, module)
        for file, module in late
        if any(file.startswith(start) and module.startswith(name) for start, name, _ in LATE)
    }
    assert late - allowed == set()
    unused = [
        line for line in LATE if not any(file.startswith(line[0]) and name.startswith(line[1]) for file, name in late)
    ]
    assert unused == []


def late_imports(tree: ast.AST) -> Iterator[str]:
    """The modules that functions import when they run."""
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module


def test_late_imports_are_seen_and_those_for_types_are_not():
    code = (
        "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    def g():\n        from c.d import e\n    import h\n"
    )
    assert sorted({*late_imports(ast.parse(code))}) == ["c.d", "h"]
