"""What a run was: its settings, seeds, versions, source revision and hardware, beside its results."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import tnpeft
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.folders import make_folder

__all__ = ["machine", "revision", "seeds_of", "versions", "write_record"]

PACKAGES = ("torch", "monai", "accelerate", "safetensors", "nibabel", "numpy", "scipy")


def write_record(out: Path, command: str, config: BaseModel, **more: Any) -> Path:
    """Write `record-COMMAND.json` to `out`; `more` is added as it is, for instance the number of processes."""
    make_folder(out)
    settings = config.model_dump(mode="json")
    record = {
        "command": command,
        "config": settings,
        "seeds": seeds_of(settings),
        "versions": versions(),
        "revision": revision(),
        "machine": machine(),
        **more,
    }
    path = out / f"record-{command}.json"
    write_json(path, record)
    return path


def seeds_of(settings: Mapping[str, Any]) -> dict[str, int]:
    """Every seed among the settings, by its dotted name."""
    found: dict[str, int] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": seed for inner, seed in seeds_of(value).items()}
        elif name == "seed" or name.endswith("_seed"):
            found[name] = value
    return found


def versions() -> dict[str, str]:
    """Versions of Python, tnpeft and the packages that a result may depend on."""
    found = {"python": platform.python_version(), "tnpeft": tnpeft.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def revision() -> str | None:
    """The git revision of the source, with `+` where files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """The hardware: a number of seconds means little without it."""
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
