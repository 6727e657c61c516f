"""The models that samples are drawn from: one base, and what each file of a fine-tuning run makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import tnpeft
from ddpm_lab.config.settings import Config
from ddpm_lab.support.durable import read_json
from ddpm_lab.support.faults import fault, raise_all, reason
from tnpeft.documents.paths import is_file, is_folder, resolved
from tnpeft.errors import Problem

__all__ = ["BASE", "RESULTS", "Variant", "find_variants", "name_of"]

BASE = "base"
RESULTS = ("adapter.safetensors", "model.safetensors", "bias_norm.safetensors")  # what `finetune` leaves
WHILE_SAMPLED = "sampled"  # its name on the model


@dataclass(frozen=True)
class Variant:
    """The base itself (no file), or the base with a file: an adapter of tnpeft, or tensors that replace the base's."""

    name: str
    path: Path | None
    tensors: tuple[str, ...] = ()  # of a file that is no adapter

    @property
    def is_adapter(self) -> bool:
        return self.path is not None and not self.tensors

    def stands_alone(self, unet: nn.Module) -> bool:
        """Whether the file has every tensor of the network, so that no base is needed."""
        return set(unet.state_dict()) <= set(self.tensors)

    @contextmanager
    def on(self, unet: nn.Module, merge: bool = False) -> Iterator[None]:
        """Inside, `unet` computes what this variant does; afterwards it is the base again, to the bit.

        Raises TnpeftError for a file that is damaged or made for another base.
        """
        if self.path is None:
            yield
        elif self.is_adapter:
            tnpeft.load(unet, self.path, name=WHILE_SAMPLED)
            try:
                unet.to(next(unet.parameters()).device)
                if merge:
                    tnpeft.merge(unet)
                yield
            finally:
                tnpeft.unmerge(unet)
                tnpeft.detach(unet)
        else:
            own = unet.state_dict()  # shares the network's memory
            state = self._read(own)
            before = {name: own[name].clone() for name in state}
            try:
                unet.load_state_dict(state, strict=False)
                yield
            finally:
                unet.load_state_dict(before, strict=False)

    def _read(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the file, which must be some of the network's."""
        assert self.path is not None
        problems, state = [], {}
        with safe_open(self.path, framework="pt") as file:
            for name in self.tensors:
                state[name] = file.get_tensor(name)
                expected = "x".join(map(str, own[name].shape)) if name in own else "no such tensor"
                found = "x".join(map(str, state[name].shape))
                if expected != found:
                    fix = "Give a result of `finetune` for this `model`."
                    problems.append(Problem(f"tensor `{name}`", expected, found, fix, str(self.path)))
        raise_all(problems, str(self.path))
        return state


def find_variants(config: Config, out: Path) -> tuple[Variant, ...]:
    """The base if it is asked for and given, then the adapters that are asked for or else the result in `out`.

    Raises LabError where there is nothing to sample, a file is missing or is none, or two have one name.
    """
    sampling, given = config.sampling, config.base.checkpoint is not None
    paths = sampling.adapters or _own_result(out)
    variants = [_variant(path) for path in paths]
    if sampling.base and given:
        variants.insert(0, Variant(BASE, None))
    if not variants:
        expected = "`base.checkpoint`, `sampling.adapters` or a result of `finetune` in `--out`"
        fix = "Pass `--set base.checkpoint=FILE`, or the `--out` of a finished run."
        raise fault(out, "a model to sample", expected, "none of them", fix)
    _check_names(variants)
    return tuple(variants)


def _own_result(out: Path) -> tuple[Path, ...]:
    """The file that the run in `out` left, the one that its summary names where there are several."""
    named = (read_json(out / "summary.json") or {}).get("result")
    names = sorted(RESULTS, key=lambda name: name != named)
    return tuple(out / name for name in names if is_file(out / name))[:1]


def name_of(path: Path) -> str:
    """What a file's samples are called: as the file or, where every run has a file of that name, as its folder."""
    return resolved(path).parent.name if path.name in RESULTS else path.name.removesuffix(".safetensors")


def _variant(path: Path) -> Variant:
    """A file's variant; raises LabError where it is none."""
    name = name_of(path)
    if not name.strip("."):
        fix = "Rename the file."
        raise fault(path, "the name of samples", "a file name with letters or digits", f"`{name}`", fix)
    if not is_file(path):
        found = "a folder" if is_folder(path) else "nothing there"
        raise fault(path, "`sampling.adapters`", "a file", found, "Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            adapter = "tnpeft" in (file.metadata() or {})
            tensors = () if adapter else tuple(sorted(file.keys()))
    except (SafetensorError, OSError) as error:
        fix = "Give a result of `finetune`."
        raise fault(path, "`sampling.adapters`", "a complete safetensors file", reason(error), fix) from None
    if not adapter and not tensors:
        raise fault(path, "`sampling.adapters`", "tensors", "none", "Give a result of `finetune`.")
    return Variant(name, path, tensors)


def _check_names(variants: Sequence[Variant]) -> None:
    """Each has a folder of its own, which must not be the base's either."""
    seen: dict[str, Variant] = {BASE: Variant(BASE, None)}
    for variant in variants:
        if variant.path is None:
            continue
        other = seen.setdefault(variant.name, variant)
        if other is not variant:
            expected = "a name for each, the file's or its folder's"
            found = f"`{variant.name}`, which is {'the base' if other.path is None else other.path}, too"
            raise fault(variant.path, "the name of samples", expected, found, "Rename the file or its folder.")
