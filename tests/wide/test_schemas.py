"""The files that hosts read, held to the schemas of their formats; the conda recipe, read by rattler-build itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tnpeft

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
RECIPE = ROOT / "docs" / "packaging" / "recipe.yaml"
CASES = [
    *(("vendor.github-workflows", path) for path in sorted((GITHUB / "workflows").iterdir())),
    *(("custom.github-workflows-require-timeout", path) for path in sorted((GITHUB / "workflows").iterdir())),
    *(("vendor.github-issue-forms", path) for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml"))),
    ("vendor.github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml"),
    ("vendor.citation-file-format", ROOT / "CITATION.cff"),
]
SLIPS = {
    "vendor.github-workflows": ("runs-on:", "run-on:"),
    "custom.github-workflows-require-timeout": ("timeout-minutes:", "timeout:"),
    "vendor.github-issue-forms": ("type: textarea", "type: text"),
    "vendor.github-issue-config": ("true", "perhaps"),
    "vendor.citation-file-format": ("authors:", "author:"),
}
IDS = [f"{schema.partition('.')[2]}-{path.name}" for schema, path in CASES]


def check(schema: str, path: Path) -> subprocess.CompletedProcess[str]:
    """The schemas come with check-jsonschema: no network."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema needs Python 3.11")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("schema", "path"), CASES, ids=IDS)
def test_the_file_is_what_its_schema_says(schema: str, path: Path):
    result = check(schema, path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("schema", "path"), CASES, ids=IDS)
def test_a_slip_is_noticed(schema: str, path: Path, tmp_path: Path):
    right, wrong = SLIPS[schema]
    text = path.read_text(encoding="utf-8")
    assert right in text
    slip = tmp_path / path.name
    slip.write_text(text.replace(right, wrong), encoding="utf-8")
    result = check(schema, slip)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Schema validation errors" in result.stdout


def test_the_conda_recipe_is_read_and_rendered():
    stage0 = pytest.importorskip("rattler_build.stage0")
    recipe = stage0.Stage0Recipe.from_file(RECIPE)
    (variant,) = recipe.render()
    rendered = variant.recipe.to_dict()
    assert rendered["package"] == {"name": "tnpeft", "version": tnpeft.__version__}


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [("requirements:", "requirement:", "requirement"), ("noarch: python", "noarch: snake", "snake")],
)
def test_a_slip_in_the_conda_recipe_is_noticed(right: str, wrong: str, said: str, tmp_path: Path):
    stage0 = pytest.importorskip("rattler_build.stage0")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.read_text(encoding="utf-8").replace(right, wrong), encoding="utf-8")
    with pytest.raises(Exception, match=said):
        stage0.Stage0Recipe.from_file(path)
