"""What holds for the project as a whole: rooms, sizes, pins, names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packages import packages_after

import tnpeft

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tnpeft"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for room in ("tests", "examples", "benchmarks", "docs") for path in ROOT.glob(f"{room}/**/*.py"))

# Each room imports only what stands to its left; the last ones stand side by side.
ROOMS = (
    "version",
    "earlier",
    "errors",
    "documents",
    "spec",
    "network",
    "planning",
    "schedule",
    "program",
    "adapters",
    "execution",
    "surgery",
    "recipe",
    "starts",
    "io",
    "integrations",
    "fitting",
    "verify",
    "testing",
    "draw",
    "searching",
    "editing",
    "cli",
)
WITHOUT_TORCH = ("version", "earlier", "errors", "documents", "spec", "network", "planning", "schedule")
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_TEST_LINES = 700  # tables of cases are long


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports when it runs, inside functions too; not those under `if TYPE_CHECKING`."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
        waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_to_the_left(path: Path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for module in imported_modules(path):
        if module.startswith("tnpeft."):
            assert module.split(".")[1] in allowed, module
        elif module == "tnpeft":
            assert room == "cli", "import rooms by name"


def test_torch_is_not_imported_before_it_is_needed():
    bound = "tnpeft.load_spec('tenvoo_l').bind('Conv3d', in_channels=64, out_channels=128, kernel_size=3)"
    assert "torch" not in packages_after(f"import tnpeft; tnpeft.plan({bound})")


WITHOUT_TORCH_CODE = """\
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
from tnpeft.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("check", "lora", "lora_ddpm", "specs/factors"), 0, "3 files, 3 without mistakes, 0 mistakes\n"),
        (("show", "lora", "--layer", "Linear:8,8", "--input", "1,8"), 0, "link 1: down: (i) 8 -> (r) 4 channels"),
        (("list",), 0, "tenvoo_q_ddpm"),
        (("schema", "recipe"), 0, '"$schema"'),
        (
            ("count", "lora_ddpm", "--model", "monai:ddpm-paper"),
            1,
            "error this command: expected torch, installed here, found none. "
            "Install the build of torch that fits this machine: `pip install torch`.\n",
        ),
    ],
)
def test_specs_and_recipes_are_read_without_torch(arguments, status, said):
    command = [sys.executable, "-c", WITHOUT_TORCH_CODE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == status, result.stderr
    assert said in result.stdout + result.stderr
    assert not result.stderr or result.stderr == said


def test_only_the_command_line_prints():
    for path in FILES:
        if room_of(path) == "cli":
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"], path


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= (MAX_TEST_LINES if ROOT / "tests" in path.parents else MAX_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_public_names_exist_and_are_documented():
    for name in tnpeft.__all__:
        value = getattr(tnpeft, name)
        assert name == "__version__" or value.__doc__, name
    assert len(set(tnpeft.__all__)) == len(tnpeft.__all__)


def test_one_ruff_for_make_and_commits():
    pins = {
        re.search(r"ruff==([\d.]+)", (ROOT / name).read_text()).group(1)
        for name in ("pyproject.toml", ".pre-commit-config.yaml")
    }
    assert len(pins) == 1


def test_every_target_of_the_makefile_is_documented():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets == listed


@pytest.mark.skipif("TNPEFT_LOWEST" not in os.environ, reason="`make lowest` alone installs the lowest versions")
def test_the_lowest_versions_are_the_installed_ones():
    """Every bound of the installed extras is the version that the tests ran with; torch is the pinned one."""
    import tomllib  # of Python 3.11, which `make lowest` takes

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = dict(
        re.fullmatch(r"([\w.-]+)>=([\w.]+)", line).groups()
        for line in (*project["dependencies"], *extras["demo"], *extras["test"])
        if ">=" in line
    )
    bounds["torch"] = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    installed = {name: version(name).partition("+")[0] for name in bounds}
    short = {name: bound for name, bound in bounds.items() if not _equal(bound, installed[name])}
    assert not short, {name: installed[name] for name in short}


def _equal(bound: str, installed: str) -> bool:
    """`0.5` is `0.5.0`."""
    left, right = bound.split("."), installed.split(".")
    length = max(len(left), len(right))
    return left + ["0"] * (length - len(left)) == right + ["0"] * (length - len(right))
