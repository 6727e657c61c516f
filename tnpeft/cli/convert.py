"""`tnpeft convert`: an adapter file of one library as a file of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tnpeft.cli.models import build_model
from tnpeft.cli.output import Output, UsageError
from tnpeft.errors import Problem, near_miss

if TYPE_CHECKING:
    from torch import nn

    from tnpeft.recipe import Handle

__all__ = ["SOURCES", "TARGETS", "convert_file"]

SOURCES = ("peft", "diffusers", "lycoris", "kohya", "comfyui", "tenvoo", "tnpeft")
TARGETS = ("tnpeft", "peft", "diffusers", "lycoris", "kohya", "comfyui")


def convert_file(
    output: Output,
    source: str,
    target: str,
    model_text: str,
    *,
    read_as: str | None,
    write_as: str | None,
    name: str | None,
    alpha: float | None,
    prefix: str | None,
    as_json: bool,
) -> None:
    """Put the adapter of `source` on the model, which is built with its weights, and write it to `target`."""
    from tnpeft.io.files import file_path
    from tnpeft.io.foreign.source import format_of

    _check("--from", read_as, SOURCES)
    _check("--to", write_as, TARGETS)
    kind = read_as or format_of(file_path(source))
    if write_as is None and kind == "tnpeft":
        expected = f"one of {', '.join(TARGETS[1:])}"
        raise UsageError(Problem("--to", expected, "none, for a file of tnpeft", "Add --to peft, say."))
    written = write_as or "tnpeft"
    if prefix is not None and written == "tnpeft":
        fix = "Leave it out, or add --to diffusers, say."
        raise UsageError(Problem("--prefix", "none for a file of tnpeft", f"{prefix[:40]!r}", fix))
    model = build_model(model_text, device="cpu")
    handle = _load(model, source, kind, name, alpha)
    _save(model, target, written, prefix)
    facts = _facts(handle)
    if as_json:
        output.data({"source": source, "target": target, "from": kind, "to": written, "model": model_text} | facts)
    else:
        layers = f"{facts['layers']} layer" + "s" * (facts["layers"] != 1)
        output.say(f"{source} ({kind}) -> {target} ({written})")
        output.say(f"{layers}, {facts['parameters']:,} parameters, read as {', '.join(facts['specs'])}")


def _check(option: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        fix = near_miss(value, known) or "Choose one of them."
        raise UsageError(Problem(option, f"one of {', '.join(known)}", f"{value[:40]!r}", fix))


def _load(model: nn.Module, source: str, kind: str, name: str | None, alpha: float | None) -> Handle:
    from tnpeft.io import load, load_foreign

    if kind == "tnpeft":
        return load(model, source, name)
    return load_foreign(model, source, name or "default", kind, alpha=alpha)


def _save(model: nn.Module, target: str, written: str, prefix: str | None) -> None:
    from tnpeft.io import save, save_foreign

    if written == "tnpeft":
        save(model, target)
    else:
        save_foreign(model, target, written, prefix=prefix)


def _facts(handle: Handle) -> dict[str, Any]:
    report = handle.report()
    specs = sorted({row.spec for row in report.layers})
    return {"name": handle.name, "layers": len(report.layers), "specs": specs, "parameters": report.trained}
