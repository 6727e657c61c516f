"""Writing PEFT's folders: one method and one config, with patterns for layers that differ."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tnpeft.errors import Problem
from tnpeft.io.files import refuse
from tnpeft.io.foreign.formats import MERGE, PEFT_DROPOUTS, trained_problem
from tnpeft.io.foreign.kron import Sizes, common_factor
from tnpeft.io.foreign.layer_tensors import SLOTS
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.peft_forms import (
    as_peft_has_it,
    is_table,
    names_of_parameters,
    saved_modules,
    tensors_of,
    written_names,
)
from tnpeft.io.foreign.peft_places import WRAPPED
from tnpeft.io.foreign.rewrites import (
    factors_of,
    half_ranks_equal,
    lokr_rank,
    lokr_tensors,
    untuckered,
    whole_large,
    whole_small,
)
from tnpeft.io.foreign.source import CONFIG, WEIGHTS
from tnpeft.io.foreign.topologies import KRONS
from tnpeft.network import Layer

__all__ = [
    "beside_problems",
    "config_of",
    "dropout_note",
    "lora_tensors",
    "method_of",
    "pattern_of",
    "peft_contents",
    "peft_problems",
    "targets",
    "usual",
]

_KINDS = {
    "LORA": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    "LOHA": ("Linear", "Conv1d", "Conv2d"),
    "LOKR": ("Linear", "Conv1d", "Conv2d"),
}
_OF_TABLES = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
_ROOT = "base_model.model."
_APART = "Attach, and save, each as an adapter of its own."


def method_of(part: LayerUpdate) -> str:
    """PEFT's name of a part's method."""
    if part.topology in KRONS:
        return "LOKR"
    return "LOHA" if part.topology.startswith("loha") else "LORA"


def peft_problems(parts: Mapping[str, LayerUpdate], layers: Mapping[str, Layer]) -> Iterator[Problem]:
    """Why PEFT cannot hold these parts, all of them."""
    methods = {name: method_of(part) for name, part in parts.items()}
    if len(set(methods.values())) > 1:
        found = ", ".join(f"{method} on '{name}'" for method, name in {m: n for n, m in methods.items()}.items())
        yield Problem("methods", "one of LoRA, LoHa and LoKr for all layers", found, _APART)
        return
    for name, layer in layers.items():
        kinds = _KINDS[methods[name]]
        where = f"layer '{name}'"
        if layer.kind not in kinds:
            yield Problem(f"PEFT's {methods[name]}", f"one of {', '.join(kinds)}", str(layer), MERGE, where)
        elif methods[name] == "LORA" and layer.groups > 1:
            yield Problem("PEFT's LORA", "an ungrouped convolution", str(layer), MERGE, where)
        elif layer.kind != "Conv1d" and KRONS.get(parts[name].topology, ("", "", False))[2]:
            expected = "the small factor as the outer one"
            yield Problem("PEFT's LOKR", expected, "the large one", MERGE, where)
    dora = [name for name, part in parts.items() if part.magnitude is not None]
    if dora and (len(dora) < len(parts) or "LORA" not in methods.values()):
        expected = "LoRA with magnitudes on every layer, or on none"
        yield Problem("PEFT's DoRA", expected, f"magnitudes of {methods[dora[0]]} on '{dora[0]}'", _APART)


def beside_problems(
    parts: Mapping[str, LayerUpdate],
    trained: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    base: Mapping[str, Tensor],
) -> Iterator[Problem]:
    """Why PEFT has no place for what trains beside the cores: it can only have biases with LoRA, and whole modules."""
    biases = _biases(parts, trained)
    if biases and any(method_of(part) != "LORA" for part in parts.values()):
        yield trained_problem(biases, "no biases of adapted layers beside LoHa and LoKr")
    saved, problems = saved_modules(trained.keys() - biases, parts, modules)
    yield from problems
    for name, tensor in tensors_of(saved, trained, base).items():
        if tensor.device.type == "meta":
            fix = "Bring it back from where it is offloaded to, or keep the adapter in tnpeft's own file."
            yield Problem("PEFT's `modules_to_save`", "values of the whole module", f"none of '{name}'", fix)


def _biases(parts: Mapping[str, LayerUpdate], trained: Mapping[str, Tensor]) -> list[str]:
    """The names that `bias` of the config is for: LoRA's of all layers, others' of adapted ones."""
    lora = all(method_of(part) == "LORA" for part in parts.values())
    owners = {name.rpartition(".")[0] for name in trained if not name.endswith(".bias")}
    biases = [name for name in trained if name.endswith(".bias")]
    return [
        name
        for name in biases
        if name.removesuffix(".bias") in parts or (lora and name.removesuffix(".bias") not in owners)
    ]


def peft_contents(
    path: Path,
    parts: Mapping[str, LayerUpdate],
    layers: Mapping[str, Layer],
    trained: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    base: Mapping[str, Tensor],
) -> dict[Path, bytes]:
    """The folder's files, the config last. Raises AdapterFileError for LoKr sizes that one config cannot express.

    `modules` are all modules by name, among which PEFT looks for the targets; `base` has the base's tensors.
    """
    method, names = method_of(next(iter(parts.values()))), names_of_parameters(parts, modules)
    if method == "LOKR":
        tensors, ranks, options = _lokr(path, parts)
    elif method == "LOHA":
        tensors, ranks, options = _loha(parts)
    else:
        tensors, ranks, options = _lora(parts, layers, modules)
    alphas = {name: parts[name].scale * ranks[name] for name in parts}
    options |= {"target_modules": targets([name for name in parts if name not in names], modules)}
    options |= {"target_parameters": names} if names else {}
    config = config_of(method, ranks, alphas, {**options, **_dropout(parts, modules)})
    written = written_names({*parts, *(name.rpartition(".")[0] for name in trained)}, parts, modules)
    values = {f"{_ROOT}{written[name]}.{key}": tensor for name in parts for key, tensor in tensors[name].items()}
    biases = _biases(parts, trained)
    if saved := saved_modules(trained.keys() - biases, parts, modules)[0]:
        config["modules_to_save"] = saved
        values |= {f"{_ROOT}{name}": value for name, value in tensors_of(saved, trained, base).items()}
    if method == "LORA":
        adapted = [name.removesuffix(".bias") in parts for name in biases]
        config["bias"] = ("lora_only" if all(adapted) else "all") if biases else "none"
        if any(layers[name].turned for name in parts if name in modules and not is_table(name, modules)):
            config["fan_in_fan_out"] = True  # PEFT's word for it
        for name in biases:
            layer = name.removesuffix(".bias")
            values[f"{_ROOT}{written[layer]}{WRAPPED if layer in parts else ''}.bias"] = trained[name]
    whole = {key: value.clone(memory_format=torch.contiguous_format) for key, value in values.items()}  # some are tied
    data = safetensors.torch.save(whole, {"format": "pt"})
    return {path / WEIGHTS: data, path / CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def dropout_note(parts: Mapping[str, LayerUpdate], modules: Mapping[str, nn.Module]) -> Problem | None:
    """The warning for dropout that PEFT's config cannot express."""
    left_out = [str(part.dropout) for part in parts.values() if part.dropout is not None]
    ((option, ours),) = PEFT_DROPOUTS[method_of(next(iter(parts.values())))].items()
    if not left_out or _dropout(parts, modules):
        return None
    expected = f"`{ours}` alone, alike on all layers and without parameters, which is PEFT's `{option}`"
    return Problem("`dropout`", expected, left_out[0], "The folder says none: set it there, if training goes on.")


def _dropout(parts: Mapping[str, LayerUpdate], modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """What of the config says what training leaves out; nothing where one number cannot say it of all layers."""
    ((option, ours),) = PEFT_DROPOUTS[method_of(next(iter(parts.values())))].items()
    every = {part.dropout for name, part in parts.items() if not is_table(name, modules)}
    dropout = next(iter(every)) if len(every) == 1 and not names_of_parameters(parts, modules) else None
    return {} if dropout is None or dropout.as_dict().keys() != {ours} else {option: dropout.as_dict()[ours]}


Tensors = dict[str, dict[str, Tensor]]


def _lora(
    parts: Mapping[str, LayerUpdate], layers: Mapping[str, Layer], modules: Mapping[str, nn.Module]
) -> tuple[Tensors, dict[str, int], dict[str, Any]]:
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    for name, part in parts.items():
        ranks[name] = part.tensors["up"].shape[-1]
        if name not in modules:
            part = as_peft_has_it(part, layers[name], modules[name.rpartition(".")[0]])
        tensors[name] = lora_tensors(part)
        if is_table(name, modules):
            tensors[name] = {_OF_TABLES.get(key, key): tensor for key, tensor in tensors[name].items()}
    dora = any(part.magnitude is not None for part in parts.values())
    return tensors, ranks, {"init_lora_weights": True, "lora_dropout": 0.0, "use_dora": dora}


def lora_tensors(part: LayerUpdate, gain: float = 1.0) -> dict[str, Tensor]:
    """PEFT's tensors of a LoRA whose update is multiplied by `gain`, by the ends of their keys."""
    up, down = (untuckered(part).tensors[core] for core in ("up", "down"))
    units = (1,) * (down.ndim - 2)
    tensors = {"lora_A.weight": down, "lora_B.weight": (up * gain).reshape(*up.shape, *units)}
    if part.magnitude is not None:
        tensors["lora_magnitude_vector"] = part.magnitude.reshape((1, -1, *units) if units else (-1,))
    return tensors


def _loha(parts: Mapping[str, LayerUpdate]) -> tuple[Tensors, dict[str, int], dict[str, Any]]:
    """With a core for the kernel only where every convolution (of a kernel larger than 1) has one."""
    halves = {name: _one_rank(part) for name, part in parts.items()}
    windows = {name for name, part in halves.items() if any(size > 1 for size in _kernel(part))}
    effective = bool(windows) and all(halves[name].topology == "loha_tucker" for name in windows)
    tensors: Tensors = {}
    for name, part in halves.items():
        if not (name in windows and effective):
            part = half_ranks_equal(untuckered(part))
        tensors[name] = {
            f"hada_{SLOTS['loha'][core]}": _four_axes(tensor) if core.startswith("mid") else tensor.flatten(1)
            for core, tensor in part.tensors.items()
        }
    ranks = {name: tensor["hada_w1_b"].shape[0] for name, tensor in tensors.items()}
    return tensors, ranks, {"use_effective_conv2d": effective, "init_weights": True}


def _one_rank(part: LayerUpdate) -> LayerUpdate:
    """LoHa-Tucker of one rank everywhere, else plain LoHa."""
    if part.topology == "loha_tucker":
        ranks = {size for half in "12" for size in part.tensors[f"mid_{half}"].shape[:2]}
        return part if len(ranks) == 1 else untuckered(part)
    return part


def _kernel(part: LayerUpdate) -> tuple[int, ...]:
    core = next(core for core in ("mid_1", "down_1") if core in part.tensors)
    return tuple(part.tensors[core].shape[2:])


def _four_axes(mid: Tensor) -> Tensor:
    """PEFT keeps a one-dimensional kernel as (k, 1)."""
    return mid.unsqueeze(-1) if mid.ndim == 3 else mid


def _lokr(path: Path, parts: Mapping[str, LayerUpdate]) -> tuple[Tensors, dict[str, int], dict[str, Any]]:
    sizes: dict[str, Sizes] = {}
    for name, part in parts.items():
        small, large = factors_of(part)
        sizes[name] = Sizes(*small.shape, *large.shape[:2])
    factor = common_factor(list(sizes.values()))
    if factor is None:
        found = "; ".join(f"'{name}': {s.a} x {s.b} and {s.c} x {s.d}" for name, s in list(sizes.items())[:3])
        expected = "factors of the channels that one `decompose_factor` gives for all layers"
        raise refuse(path, "PEFT's LOKR", expected, found, _APART)
    reduced = {name: _low_where_smaller(untuckered(part), sizes[name]) for name, part in parts.items()}
    for name, part in reduced.items():
        whole = part.tensors.get("large")
        if whole is not None and whole.ndim == 3 and not KRONS[part.topology][2]:
            expected = "a rank below half the larger side of the second factor, which PEFT scrambles if it is whole"
            found = f"a {whole.shape[0]} x {whole.shape[1]} factor of layer '{name}'"
            raise refuse(path, "PEFT's LOKR on Conv1d", expected, found, MERGE)
    ranks = {name: lokr_rank(part) or max(sizes[name]) for name, part in reduced.items()}
    # PEFT keeps the small factor whole unless `decompose_both`, and then only where the rank is too large for it.
    both = all(
        "small_up" in part.tensors or 2 * ranks[name] >= max(sizes[name].a, sizes[name].c)
        for name, part in reduced.items()
    ) and any("small_up" in part.tensors for part in reduced.values())
    tensors: Tensors = {}
    for name, part in reduced.items():
        part = part if both and 2 * ranks[name] < max(sizes[name].a, sizes[name].c) else whole_small(part)
        tensors[name] = lokr_tensors(part, ranks[name])
    options = {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": False, "init_weights": True}
    return tensors, ranks, options


def _low_where_smaller(part: LayerUpdate, size: Sizes) -> LayerUpdate:
    """PEFT builds the large factor whole once the rank is half its larger side."""
    rank = lokr_rank(part)
    return part if rank is not None and 2 * rank < max(size.b, size.d) else whole_large(part)


def config_of(
    method: str, ranks: Mapping[str, int], alphas: Mapping[str, float], options: Mapping[str, Any]
) -> dict[str, Any]:
    """PEFT's config: the usual rank and alpha, and those of other layers by patterns."""
    rank, alpha = usual(ranks), usual(alphas)
    return {
        "peft_type": method,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha" if method == "LORA" else "alpha": _plain(alpha),
        "rank_pattern": {pattern_of(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern_of(name): _plain(value) for name, value in alphas.items() if value != alpha},
        **options,
    }


def usual(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _plain(value: float) -> int | float:
    near = float(f"{value:.15g}")
    return int(near) if near.is_integer() and math.isfinite(near) else near


def pattern_of(name: str) -> str:
    """PEFT looks for a pattern at the end of a name: this one is the name itself."""
    return f"^{re.escape(name)}"


def targets(names: list[str], modules: Collection[str]) -> list[str] | str:
    """The layers by name, or as one expression if PEFT, which compares the ends of names, would take others too."""
    if any(other not in names and other.endswith(f".{name}") for name in names for other in modules):
        return "|".join(re.escape(name) for name in names)
    return sorted(names)
