"""Packages that are not installed: each is told in one sentence, with the line for pip."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packages import packages_after

from tnpeft.errors import INSTALLED_BY, TnpeftError, needing

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tnpeft").rglob("*.py"))
CORE = {"cotengra", "networkx", "numpy", "opt_einsum", "pydantic", "yaml"}
CORE |= {"rich", "safetensors", "torch", "typer", "tnpeft"}
BROUGHT = {"fastapi", "starlette", "uvicorn"} | {"lsprotocol"} | {"sqlalchemy"}  # by NiceGUI, pygls and Optuna


def optional_imports(path: Path) -> set[str]:
    """The packages that a file imports anywhere and tnpeft does not depend on."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - CORE - BROUGHT - sys.stdlib_module_names


def test_every_optional_import_has_its_line_for_pip():
    imported = set().union(*map(optional_imports, FILES))
    assert imported | {"monai"} == set(INSTALLED_BY)  # the driver's networks are imported by name


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_extra_that_is_named_brings_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {package: line[len("'tnpeft[") : -len("]'")] for package, line in INSTALLED_BY.items() if "[" in line}
    assert named
    for package, extra in named.items():
        brought = project["optional-dependencies"][extra]
        assert any(requirement.startswith(f"{package}>=") for requirement in brought), package


WITHOUT_CODE = """
import sys, warnings
warnings.simplefilter("ignore")

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Without())
import tnpeft.errors
from importlib.util import find_spec

def missing(name):
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None

tnpeft.errors.find_spec = missing
from typer.testing import CliRunner
from tnpeft.cli import app

for command in (
    "draw lora -o x.svg",
    "edit lora",
    "lsp",
    "search a b -m torch.nn:Flatten --match all -p 5k -o x.yaml",
    "verify lora",
    "count lora_ddpm -m monai:maisi",
):
    done = CliRunner().invoke(app, command.split())
    print(done.exit_code, done.stderr.strip())
try:
    import tnpeft.integrations.transformers
except tnpeft.TnpeftError as error:
    print(error)
"""


def test_without_any_of_them_each_says_what_to_install():
    code = WITHOUT_CODE.format(packages=sorted(INSTALLED_BY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "1 error pictures: expected the package matplotlib, found none installed. Run `pip install 'tnpeft[draw]'`.",
        "1 error edit: expected the package nicegui, found none installed. Run `pip install 'tnpeft[edit]'`.",
        "1 error lsp: expected the package pygls, found none installed. Run `pip install 'tnpeft[lsp]'`.",
        "1 error search: expected the package optuna, found none installed. Run `pip install 'tnpeft[search]'`.",
        "1 error verify: expected the package hypothesis, found none installed. Run `pip install 'tnpeft[testing]'`.",
        "1 error --model monai:maisi: expected the package monai, found none installed. "
        "Run `pip install 'tnpeft[demo]'`.",
        "tnpeft.integrations.transformers: expected the package transformers, found none installed. "
        "Run `pip install transformers`.",
    ]


def test_what_the_package_itself_misses_is_not_called_missing():
    with pytest.raises(ModuleNotFoundError, match="No module named 'its_own_need'"), needing("monai", "a test"):
        raise ModuleNotFoundError("No module named 'its_own_need'", name="its_own_need")
    with pytest.raises(TnpeftError), needing("monai", "a test"):
        raise ModuleNotFoundError("No module named 'monai'", name="monai")


def test_the_library_starts_without_the_command_lines_packages():
    assert not {"typer", "rich"} & packages_after("import tnpeft, torch; tnpeft.load_spec('lora')")
