"""`make pythons`: the wheel on the other versions of Python, with everything it needs but torch.

    python tests/pythons.py 3.10 3.12

For each version that is installed here a fresh environment gets the wheel and the newest of its dependencies; the
package is imported there, a spec bound, every shipped file checked and a spec shown. The rest is skipped, and said so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
BIND = "import tnpeft; print(tnpeft.load_spec('tenvoo_l').bind('Conv3d', in_channels=8, out_channels=8, kernel_size=3))"
COMMANDS = (
    ("-c", BIND),
    ("-m", "tnpeft", "check", *(path.stem for path in sorted((ROOT / "specs").glob("*.yaml"))), "lora_ddpm"),
    ("-m", "tnpeft", "show", "lora", "--layer", "Linear:8,8"),
    ("-m", "tnpeft", "--help"),
)


def run(*command: str | Path, cwd: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)


def interpreter(version: str) -> Path | None:
    """A Python of this version: on the PATH, or one that pyenv keeps beside others."""
    names = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for name in filter(None, names):
        found = run(name, "-c", "import sys; print('{}.{}'.format(*sys.version_info))", cwd="/")
        if found.stdout.strip() == version:
            return Path(name)
    return None


def mistakes(python: Path, wheel: Path, folder: str) -> Iterator[str]:
    """What fails in a fresh environment of this interpreter."""
    home = Path(folder) / "venv"
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pip = (home / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q")
    steps = (
        (python, "-m", "venv", home),
        (*pip, *(name for name in needed if not name.startswith("torch"))),
        (*pip, "--no-deps", wheel),
    )
    for step in (*steps, *((home / "bin/python", "-W", "error", *command) for command in COMMANDS)):
        result = run(*step, cwd=folder)
        if result.returncode:
            yield f"{' '.join(map(str, step[1:]))[:80]}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
            return


def main(versions: list[str]) -> int:
    failed = passed = skipped = 0
    with tempfile.TemporaryDirectory() as dist:
        built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", ROOT, "-w", dist, cwd=dist)
        if built.returncode:
            print(built.stderr)
            return 1
        (wheel,) = Path(dist).glob("tnpeft-*.whl")
        for version in versions:
            python = interpreter(version)
            if python is None:
                print(f"Python {version}: skipped, it is not installed here")
                skipped += 1
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = list(mistakes(python, wheel, folder))
            print(f"Python {version}: " + (f"failed at {found[0]}" if found else "imports, checks and shows"))
            failed, passed = failed + bool(found), passed + (not found)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
