"""From `monai:maisi`, a similar name or `package.module:factory` to a model, by default on the meta device."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnpeft.cli.output import UsageError
from tnpeft.errors import INSTALLED_BY, Problem, TnpeftError, near_miss, needing

if TYPE_CHECKING:
    import torch

__all__ = ["build_example", "build_model"]

# What other people's modules and factories may raise; an interrupt or a crash of the interpreter is not theirs.
_THEIR_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def build_model(text: str, device: str = "meta") -> torch.nn.Module:
    """Build the model that `text` names; raises TnpeftError that says which step failed."""
    import torch

    factory = _factory(text)
    try:
        with torch.device(device):
            model = factory()
    except _THEIR_ERRORS as error:
        fix = "It is called without arguments."
        if device == "meta":
            fix = "It is called without arguments, on the meta device: what reads values or files cannot stand in it."
        raise _mistake(text, "calling the factory", "a model", _said(error), fix) from error
    if not isinstance(model, torch.nn.Module):
        fix = "Let the factory return the model itself."
        raise _mistake(text, "what the factory returns", "a torch.nn.Module", f"a {type(model).__name__}", fix)
    return model


def build_example(text: str) -> tuple[Any, ...]:
    """The arguments that the function named by `text` returns: a tuple, or else the only argument."""
    try:
        example = _factory(text, "--example")()
    except _THEIR_ERRORS as error:
        fix = "It is called without arguments."
        raise TnpeftError(
            Problem("calling the function", "arguments of a call", _said(error), fix, "--example")
        ) from error
    return example if isinstance(example, tuple) else (example,)


def _factory(text: str, option: str = "--model") -> Callable[[], Any]:
    module_name, colon, name = text.partition(":")
    written = _as_module(text)
    if written or not colon or not module_name or not name:
        fix = written or f"Write it like `my_package.models:build_unet`, or one of {', '.join(KNOWN)}."
        raise UsageError(Problem("the model", "package.module:factory", f"{text[:60]!r}", fix, option))
    if text in KNOWN:
        return KNOWN[text]
    if module_name == "monai":
        fix = near_miss(text, KNOWN) or f"Known are {', '.join(KNOWN)}."
        raise _mistake(text, "the model", f"one of {', '.join(KNOWN)}", f"{text[:60]!r}", fix)
    module = _import(module_name, text)
    if not hasattr(module, name):
        fix = near_miss(name, vars(module)) or "Check its spelling."
        raise _mistake(text, "the factory", f"a function in {module_name}", f"no {name!r} there", fix)
    factory = getattr(module, name)
    if not callable(factory):
        fix = "Name a function or class that makes the model."
        raise _mistake(text, "the factory", "a function or class", f"a {type(factory).__name__}", fix)
    return factory  # type: ignore[no-any-return]  # whatever it returns is checked where it is called


def _as_module(text: str) -> str:
    """The path of a Python file, a dotted name or a call as `module:factory`; empty for other texts."""
    place, colon, name = text.partition(":")
    parts = place.removesuffix("()").split(".")
    if not colon and len(parts) > 1 and parts[-1] != "py" and all(map(str.isidentifier, parts)):
        return f"Write `{'.'.join(parts[:-1])}:{parts[-1]}`."
    name = name.strip(":").removesuffix("()")
    called, bracket, _ = name.partition("(")
    if bracket and called.isidentifier():
        return f"Write a function without arguments that returns `{name[:40]}`, and name that."
    path = Path(place)
    separated = path.suffix == ".py" or "/" in place or "\\" in place
    if not separated and name == text.partition(":")[2]:
        return ""
    name = name or "NAME"
    naming = ", NAME being the function or class that makes the model" if name == "NAME" else ""
    steps = path.with_suffix("").parts if path.suffix == ".py" else path.parts
    if path.is_absolute() or ".." in steps:
        folder = "its folder" if path.is_absolute() else f"the folder {str(path.parent)!r}"
        return f"Run it in {folder} and write `{steps[-1]}:{name}`{naming}."
    return f"Write `{'.'.join(steps)}:{name}`{naming}."


def _import(name: str, text: str) -> object:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not look in the working directory, `python -m` does
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except _THEIR_ERRORS as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None
        fix = f"Run it where {name.partition('.')[0]!r} can be imported." if missing else "Mend the module."
        raise _mistake(text, f"importing {name}", "a module", _said(error), fix) from error


def _said(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


def _mistake(text: str, what: str, expected: str, found: str, fix: str) -> TnpeftError:
    return TnpeftError(Problem(what, expected, found, fix, f"--model {text[:80]}"))


def _monai(text: str, module: str, name: str) -> Callable[..., Any]:
    """A network class of MONAI."""
    try:
        with needing("monai", f"--model {text}"):
            found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        fix = f"Run `pip install {INSTALLED_BY['monai']}`."
        raise _mistake(text, "MONAI", "monai 1.6 or newer", _said(error), fix) from error
    return found


def _ddpm_paper() -> Any:
    """The diffusion model of Li et al., MICCAI 2025: 166.67 M parameters."""
    network = _monai("monai:ddpm-paper", "monai.networks.nets.diffusion_model_unet", "DiffusionModelUNet")
    return network(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=2,
        channels=(32, 32, 64, 128, 256, 512),
        attention_levels=(False, False, False, False, True, True),
        norm_num_groups=32,
        norm_eps=1e-6,
        num_head_channels=(0, 0, 0, 0, 256, 512),
    )


# What MAISI's diffusion model and ControlNet have in common. Flash attention changes no parameter and wants a GPU.
_MAISI: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 4,
    "num_channels": (64, 128, 256, 512),
    "attention_levels": (False, False, True, True),
    "num_head_channels": (0, 0, 32, 32),
    "num_res_blocks": 2,
    "use_flash_attention": False,
}
_MAISI_NETWORKS = "monai.apps.generation.maisi.networks"


def _maisi() -> Any:
    """The diffusion model of MAISI's DDPM version (Guo et al., WACV 2025): 169.37 M parameters."""
    network = _monai("monai:maisi", f"{_MAISI_NETWORKS}.diffusion_model_unet_maisi", "DiffusionModelUNetMaisi")
    inputs = ("include_top_region_index_input", "include_bottom_region_index_input", "include_spacing_input")
    return network(**_MAISI, out_channels=4, **dict.fromkeys(inputs, True))


def _maisi_controlnet() -> Any:
    """MAISI's ControlNet: 68.64 M parameters."""
    network = _monai("monai:maisi-controlnet", f"{_MAISI_NETWORKS}.controlnet_maisi", "ControlNetMaisi")
    condition = {"conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": (8, 32, 64)}
    return network(**_MAISI, **condition)


KNOWN: dict[str, Callable[[], Any]] = {
    "monai:ddpm-paper": _ddpm_paper,
    "monai:maisi": _maisi,
    "monai:maisi-controlnet": _maisi_controlnet,
}
