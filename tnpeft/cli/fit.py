"""`tnpeft fit`: a full fine-tune as an adapter file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any, cast

from tnpeft.cli.arguments import parse_scopes, parse_settings
from tnpeft.cli.count import check_match, check_params, load_what
from tnpeft.cli.models import build_model
from tnpeft.cli.output import Output, UsageError, table
from tnpeft.documents.paths import is_file, is_folder, resolved
from tnpeft.errors import Problem, shown_path
from tnpeft.network import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tnpeft.fitting import ExtractedLayer, Extraction
    from tnpeft.fitting.fit import Method
    from tnpeft.recipe import Recipe

__all__ = ["fit_adapter_file"]

_SHOWN = 10  # unexplained tensors in the text
_TAKEN = "layers were taken as their weights' axes say, without groups; the file loads onto no others (see --model)"
_METHODS = ("auto", "als", "adam")


def fit_adapter_file(
    output: Output,
    base: str,
    tuned: str | None,
    delta: str | None,
    model_text: str | None,
    recipe: str | None,
    spec: str | None,
    match: str | None,
    target: str,
    settings: Sequence[str],
    scopes: Sequence[str],
    *,
    name: str,
    method: str,
    iterations: int | None,
    largest_error: float | None,
    quiet: bool,
    as_json: bool,
) -> bool:
    """Fit, save and report; false where a layer's relative error is above `largest_error`."""
    from tnpeft.fitting import extract
    from tnpeft.fitting.skeleton import note_layers
    from tnpeft.io import save

    changed = _one_change(tuned, delta)
    what = _recipe_or_spec(recipe, spec)
    params: dict[str, Any] = parse_settings(settings)
    check_params(what, params)
    check_match(what, match)
    _check_method(method, iterations)
    _check_target(target, base, changed)
    model, full = _base_and_tuned(base, changed, delta is not None, model_text)
    how: dict[str, Any] = {"match": match, "scopes": parse_scopes(scopes) or None, "name": name}
    how |= {"method": cast("Method", method), "iterations": iterations}
    extraction = extract(model, full, what, **how, progress=None if quiet else partial(_progress, output), **params)
    if model_text is None:
        note_layers(model, name)
    save(model, target)
    worst = max(row.error for row in extraction.layers)
    good = largest_error is None or worst <= largest_error
    if as_json:
        sources = {"base": base, "tuned": tuned, "delta": delta}
        output.data(sources | {"file": target, "ok": good} | extraction.as_dict())
    else:
        _print_extraction(output, target, extraction)
        if model_text is None:
            output.say(_TAKEN)
        if not good:
            output.say(f"the largest relative error, {worst:.3e}, is above {largest_error:g}")
    return good


def _one_change(tuned: str | None, delta: str | None) -> str:
    """The file of the fine-tune, or of the differences, tuned minus base. Raises UsageError for both or neither."""
    if (tuned is None) == (delta is None):
        fix = "Write `tnpeft fit BASE TUNED ...`, or `tnpeft fit BASE --delta CHANGE ...`."
        found = "neither" if tuned is None else "both"
        raise UsageError(Problem("what to fit to", "TUNED or --delta", found, fix))
    return tuned or delta or ""


def _base_and_tuned(
    base: str, changed: str, is_delta: bool, model_text: str | None
) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The model with the base's weights, or a stand-in for it, and the fine-tune's tensors."""
    from tnpeft.fitting.checkpoint import Changed, Checkpoint, fill
    from tnpeft.fitting.skeleton import skeleton_of

    source, full = Checkpoint(base), Checkpoint(changed)
    model = skeleton_of(source) if model_text is None else build_model(model_text)
    fill(model, source)
    return model, Changed(source, full) if is_delta else full


def _recipe_or_spec(recipe: str | None, spec: str | None) -> Spec | Recipe:
    if (recipe is None) == (spec is None):
        found = "neither" if recipe is None else "both"
        fix = r"For example --recipe lora_ddpm, or --spec lora --match 'attn\.to_[qv]$'."
        raise UsageError(Problem("what to fit", "--recipe, or --spec with --match", found, fix))
    text = cast(str, recipe if spec is None else spec)
    what = load_what(text)
    if isinstance(what, Spec) != (spec is not None):
        given, other = ("--spec", "--recipe") if spec is not None else ("--recipe", "--spec")
        kind = "a spec" if isinstance(what, Spec) else "a recipe"
        raise UsageError(Problem(given, f"a {given[2:]}", f"{kind}, '{what.name}'", f"Write `{other} {quote(text)}`."))
    return what


def _check_method(method: str, iterations: int | None) -> None:
    if method not in _METHODS:
        fix = "Leave it out, or choose one of them."
        raise UsageError(Problem("--method", f"one of {', '.join(_METHODS)}", f"{method[:40]!a}", fix))
    if iterations is not None and iterations < 1:
        fix = "Leave it out, or allow 100, say."
        raise UsageError(Problem("--iterations", "a positive whole number", f"{iterations}", fix))


def _check_target(target: str, *sources: str) -> None:
    """Check the target first, because fitting takes minutes. No checkpoint is overwritten."""
    from tnpeft.io.files import file_path

    path = file_path(target)
    real = resolved(path)
    fix = "For example -o adapter.safetensors."
    for source in map(file_path, sources):
        if real == resolved(source) or (real.parent == resolved(source) and is_file(path)):
            raise UsageError(Problem("--output", "a file of its own", f"a checkpoint, {shown_path(source)}", fix))
    if is_folder(path) or not is_folder(real.parent):
        found = "a folder" if is_folder(path) else f"no folder '{shown_path(path.parent)}'"
        raise UsageError(Problem("--output", "a file name in a folder that exists", found, fix))


def _progress(output: Output, row: ExtractedLayer, number: int, layers: int) -> None:
    error = f"relative error {row.error:.3e}, sweeps {row.sweeps}, {row.seconds:.1f} s"
    output.progress(f"[{number}/{layers}] {row.name}: {row.spec}, {error}")


def _print_extraction(output: Output, target: str, extraction: Extraction) -> None:
    columns = {"layer": "left", "kind": "left", "spec": "left", "parameters": "right"}
    columns |= {"change": "right", "error": "right", "captured": "right", "by": "left"}
    rows = (
        (
            row.name,
            row.layer,
            row.spec,
            f"{row.parameters:,}",
            f"{row.norm:.3e}",
            f"{row.error:.3e}",
            f"{row.captured:.2%}",
            f"{row.method}, {row.sweeps}" if row.sweeps else row.method,
        )
        for row in extraction.layers
    )
    output.show(table(target, columns, rows))
    output.say()
    output.say(
        f"layers       {len(extraction.layers)}, parameters {sum(row.parameters for row in extraction.layers):,}"
    )
    copies = Counter(row.frozen_copy for row in extraction.layers if row.frozen_copy is not None)
    if copies:
        output.say(f"frozen copy  zeros in {copies['zeros']} layers, as drawn in {copies['drawn']}")
    output.say(f"copied       {len(extraction.copied)} biases, norms and statistics as they are tuned")
    output.say(f"change       {extraction.norm:.3e}, of its energy {extraction.captured:.2%} captured")
    if not extraction.unexplained:
        output.say("unexplained  nothing: the recipe covers all that changed")
        return
    output.say(f"unexplained  {extraction.missing:.3e} in {len(extraction.unexplained)} tensors outside the recipe:")
    for left in extraction.unexplained[:_SHOWN]:
        output.say(f"  {left.norm:.3e}  {left.name}")
    if len(extraction.unexplained) > _SHOWN:
        output.say(f"  and {len(extraction.unexplained) - _SHOWN} more")
