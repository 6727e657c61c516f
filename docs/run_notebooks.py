"""Run the notebooks, and keep what they print and draw.

    python docs/run_notebooks.py

It needs `pip install -e '.[demo,draw,testing,docs]'`. Times, counters and paths are not kept. A cell that raises fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SECONDS = 600


def executed(path: Path) -> Any:
    """The notebook with the outputs of this run, as it is committed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [_kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    language = {"name": notebook.metadata["language_info"]["name"]}
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": language}
    return notebook


def _kept(output: Any) -> Any:
    if output.output_type != "stream":
        output.metadata = {}
        output.data.pop("text/html", None)
        if len(output.data) > 1:
            output.data.pop("text/plain", None)  # it has an address in memory
    if "execution_count" in output:
        output.execution_count = None
    return output


def main() -> None:
    import nbformat

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        nbformat.write(executed(path), path)


if __name__ == "__main__":
    main()
