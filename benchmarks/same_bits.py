"""Does this tree compute what another commit computes, bit for bit where it must?

    python benchmarks/same_bits.py 7a8f007            compare that commit with this working tree
    python benchmarks/same_bits.py --write tests/data/values.json

Both are run on this machine, by this interpreter, one after the other. For every shipped spec on every kind of layer
it names: starts (cores and frozen copies), delta weights and adapter files have the same bits; outputs and gradients in
every mode, alone and with layers contracted together, agree to 1e-6 of their largest value.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from smallest import MODES, attached, pairs
from torch import Tensor, nn

import tnpeft

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-6
BITS, CLOSE, TEXTS = "bits", "close", "texts"
# What a file says of the machine and of the library that wrote it.
_OF_ITS_TIME = ("tnpeft", "sha256", "format")


def drawn(name: str, shape: Iterable[int]) -> Tensor:
    """Numbers that depend on a name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(shape), generator=generator)


def moved(model: nn.Module) -> None:
    """Take every trained core a tenth of the way to others."""
    with torch.no_grad():
        for name, parameter in _cores(model):
            parameter.add_(0.1 * (drawn(name, parameter.shape) - parameter))


def _cores(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains, by names that no rename of a class changes: of the layer, and of the core."""
    seen: set[int] = set()
    for layer, module in model.named_modules():
        if not hasattr(module, "adapter"):
            continue
        adapter = module.adapter("default")
        magnitude = getattr(adapter, "magnitude", None)
        named = {**dict(adapter.cores), **({} if magnitude is None else {"magnitude": magnitude})}
        for name, core in sorted(named.items()):
            if isinstance(core, nn.Parameter) and core.requires_grad and id(core) not in seen:
                seen.add(id(core))
                yield f"{layer}.{name}", core


def outputs_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a second forward pass, in which layers that are alike are contracted together."""
    leaf = x.clone().requires_grad_()
    model(leaf)
    output = model(leaf)
    cores = dict(_cores(model))
    loss = (output * drawn("gradient", output.shape).to(output.dtype)).sum()
    gradients = torch.autograd.grad(loss, [leaf, *cores.values()])
    return {"output": output.detach(), **dict(zip(("input", *cores), gradients, strict=True))}


class Trio(nn.Module):
    """Three layers of one shape, one of another and a Linear layer, which a forward pass contracts together."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(4, 4, 3, padding=1) for _ in range(3))
        self.wide = nn.Conv3d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.head(self.wide(x).mean((2, 3, 4)))  # type: ignore[no-any-return]


def trio(spec: str, mode: str) -> tuple[nn.Module, torch.Size] | None:
    """Several adapted layers; None for specs of other layers."""
    model = Trio().eval()
    try:
        tnpeft.attach(model, spec, match=r"convs|wide", mode=mode)
    except tnpeft.TnpeftError:
        return None
    return model, torch.Size((2, 4, 3, 4, 3))


def record(kind: str, spec: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """What is compared of one spec on one kind of layer: tensors, and the texts of files."""
    tensors: dict[str, dict[str, Tensor]] = {BITS: {}, CLOSE: {}}
    texts = {}
    for mode in MODES:
        torch.manual_seed(0)
        model, shape = attached(kind, spec, mode)
        adapter = model[0].adapter("default")
        if mode == "dense":
            tensors[BITS].update({f"start {name}": core.detach().clone() for name, core in adapter.cores.items()})
        moved(model)
        if mode == "dense":
            tensors[BITS]["delta weight"] = adapter.delta_weight().detach().clone()
            saved, text = file_of(model)
            tensors[BITS].update({f"file {key}": tensor for key, tensor in saved.items()})
            texts["file"] = text
        for name, value in outputs_and_gradients(model, drawn("x", shape)).items():
            tensors[CLOSE][f"{mode} {name}"] = value
    return tensors, texts


def record_together(spec: str) -> dict[str, Tensor]:
    """Outputs and gradients of several layers, by their modes."""
    found: dict[str, Tensor] = {}
    for mode in MODES:
        torch.manual_seed(0)
        if (subject := trio(spec, mode)) is None:
            return {}
        model, shape = subject
        moved(model)
        found |= {f"{mode} {name}": value for name, value in outputs_and_gradients(model, drawn("x", shape)).items()}
    return found


def file_of(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The tensors of a saved adapter, and what its header says of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        tnpeft.save(model, path)
        with safe_open(path, "pt") as file:
            header = json.loads(next(iter((file.metadata() or {}).values())))
        tensors = load_file(path)
    for key in _OF_ITS_TIME:
        header.pop(key, None)
    return tensors, json.dumps(header, sort_keys=True)


def record_all(path: Path) -> None:
    """Everything, in one file."""
    torch.set_num_threads(1)
    tensors: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    for kind, spec in pairs():
        try:
            found, said = record(kind, spec)
        except tnpeft.TnpeftError as error:
            texts[f"refused|{spec} {kind}"] = str(error).splitlines()[0]
            continue
        for how, values in found.items():
            tensors |= {f"{how}|{spec} {kind}: {name}": value.contiguous() for name, value in values.items()}
        texts |= {f"{TEXTS}|{spec} {kind}: {name}": text for name, text in said.items()}
    for spec in tnpeft.list_specs():
        values = record_together(spec)
        tensors |= {f"{CLOSE}|{spec} together: {name}": value.contiguous() for name, value in values.items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, texts)


def run_at(folder: Path, path: Path) -> None:
    """Record what the tnpeft in a folder computes."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--record", str(path)]
    subprocess.run(command, check=True, env=environment)


def differences(old: Path, new: Path) -> Iterator[str]:
    """What is not as it was, in words."""
    with safe_open(old, "pt") as file:
        texts = dict(file.metadata() or {})
    with safe_open(new, "pt") as file:
        others = dict(file.metadata() or {})
    before, after = load_file(old), load_file(new)
    for missing in sorted((before.keys() | texts.keys()) - (after.keys() | others.keys())):
        yield f"{missing}: gone"
    for key, text in sorted(texts.items()):
        if key in others and (problem := _changed(text, others[key])):
            yield f"{key}: {problem}"
    for key, tensor in before.items():
        if key in after and (problem := _differs(key.startswith(BITS), tensor, after[key])):
            yield f"{key}: {problem}"


def _differs(exactly: bool, old: Tensor, new: Tensor) -> str | None:
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{tuple(old.shape)} {old.dtype} was, {tuple(new.shape)} {new.dtype} is"
    if exactly:
        same = torch.equal(old.nan_to_num(), new.nan_to_num()) and torch.equal(old.isnan(), new.isnan())
        return None if same else f"other bits, {error(new, old):.1e} away"
    return None if error(new, old) <= TOLERANCE else f"{error(new, old):.1e} away"


def error(new: Tensor, old: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    largest = float(old.abs().max()) if old.numel() else 0.0
    return float((new.double() - old.double()).abs().max()) / (largest or 1.0) if old.numel() else 0.0


def _changed(old: str, new: str) -> str | None:
    """What a text says otherwise. A file's header may say more than it did."""
    if not old.startswith("{"):
        return None if old == new else f"{old!r} was, {new!r} is"
    changed = [*_changed_fields(json.loads(old), json.loads(new), "")]
    return f"other values of {', '.join(changed)}" if changed else None


def _changed_fields(old: object, new: object, place: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            yield from _changed_fields(value, new.get(key), f"{place}.{key}" if place else key)
    elif old != new:
        yield place


def summary(values: Mapping[str, Tensor]) -> dict[str, tuple[float, float, float]]:
    """Of each tensor its largest value, its size, and a sum with signs: few numbers, which every element moves."""
    found = {}
    for name, value in values.items():
        wide = value.double().flatten()
        signed = wide @ drawn(name, wide.shape).double()
        found[name] = (float(wide.abs().max()), float(wide.norm()), float(signed))
    return found


def summary_error(values: Mapping[str, Tensor], known: Mapping[str, Sequence[float]]) -> float:
    """How far tensors are from those of a summary: the error of an element, as it must be at least."""
    assert values.keys() == known.keys(), "other tensors"
    worst = 0.0
    for name, found in summary(values).items():
        spread = values[name].numel() ** 0.5 * (known[name][0] or 1.0)
        worst = max(worst, *(abs(now - then) / spread for now, then in zip(found[1:], known[name][1:], strict=True)))
    return worst


def values_of(kind: str, spec: str, mode: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor] | None:
    """Outputs and gradients of one spec on one kind of layer; None where it takes no size that was tried.

    Cores and inputs are drawn as float32 numbers.
    """
    torch.manual_seed(0)
    try:
        model, shape = attached(kind, spec, mode)
    except tnpeft.TnpeftError:
        return None
    moved(model)
    return outputs_and_gradients(model.to(dtype), drawn("x", shape).to(dtype))


def write_values(path: Path) -> None:
    """Summaries of what every spec computes in float64 on every kind of layer."""
    torch.set_num_threads(1)
    table: dict[str, Any] = {}
    for kind, spec in pairs():
        if (values := values_of(kind, spec, "dense", torch.float64)) is not None:
            table[f"{spec} {kind}"] = {
                name: [float(f"{number:.9g}") for number in numbers] for name, numbers in summary(values).items()
            }
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    path.write_text(f"{{\n{text}\n}}\n")


def main() -> None:
    options = common.parser(__doc__, "same_bits.json")
    options.add_argument("commit", nargs="?", help="the commit to compare this working tree with")
    options.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--write", type=Path, help="write reference values, which are committed, to this file")
    arguments = options.parse_args()
    if arguments.record is not None:
        record_all(arguments.record)
        return
    if arguments.write is not None:
        write_values(arguments.write)
        return
    if arguments.commit is None:
        options.error("name a commit, for example 7a8f007")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["git", "archive", arguments.commit]
        archive = subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder / "old", filter="data")
        run_at(folder / "old", folder / "old.safetensors")
        run_at(ROOT, folder / "new.safetensors")
        found = list(differences(folder / "old.safetensors", folder / "new.safetensors"))
        count = len(load_file(folder / "new.safetensors"))
    sys.stdout.write("".join(f"{line}\n" for line in found))
    sys.stdout.write(f"{count} tensors of {len(pairs())} layers compared with {arguments.commit}: ")
    sys.stdout.write(f"{len(found)} differ\n" if found else "all as they were\n")
    common.write(arguments.out, {"commit": arguments.commit, "tensors": count, "differ": found})
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
