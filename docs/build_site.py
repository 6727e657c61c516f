"""Build the site into build/site/html: `make docs`, or

    python docs/build_site.py

It needs `pip install -e '.[docs]'` and no network. A link that leads nowhere, or any other warning, fails the build.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]


def main() -> int:
    from site_pages.assemble import assemble

    if importlib.util.find_spec("zensical") is None:
        sys.stderr.write("The site needs Python 3.11 or newer, and `pip install -e '.[docs]'`.\n")
        return 1
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "site"
    assemble(folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
