"""The parts of a pipeline that one file may adapt: a denoiser and text encoders, each with its own prefixes.

A file for one of them is put on that model itself. A file for several is put on a module with each as a child, under
any of the names below, such as `nn.ModuleDict({"unet": unet, "te": text_encoder})`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from tnpeft.errors import AdapterFileError, Problem
from tnpeft.io.foreign.source import HEADER, Source

__all__ = ["components", "named_parts"]


@dataclass(frozen=True)
class _Role:
    """The names of a part: as a child of a model, and as a prefix of underscored and of dotted names.

    The first of each is the one that is proposed and written.
    """

    children: tuple[str, ...]
    flat: tuple[str, ...]
    dotted: tuple[str, ...]


_UNET = _Role(
    ("unet", "transformer", "diffusion_model"),
    ("lora_unet_", "lora_transformer_"),
    ("unet.", "transformer.", "model.diffusion_model.", "diffusion_model."),
)
_TEXT = _Role(
    ("te", "te1", "text_encoder"), ("lora_te_", "lora_te1_"), ("text_encoder.", "text_encoders.clip_l.transformer.")
)
_ROLES = (
    _UNET,
    _Role(("transformer_2",), (), ("transformer_2.",)),
    _TEXT,
    _Role(("te2", "text_encoder_2"), ("lora_te2_",), ("text_encoder_2.", "text_encoders.clip_g.transformer.")),
    _Role(("te3", "text_encoder_3"), ("lora_te3_",), ("text_encoder_3.",)),
)
_PREFIXES = {prefix: role for role in _ROLES for prefix in (*role.flat, *role.dotted)}


@dataclass
class _Group:
    """The tensors under one prefix, by the rest of their keys; `role` is None where no prefix is known."""

    prefix: str
    role: _Role | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)


def components(source: Source, names: Collection[str]) -> Iterator[Source]:
    """The file's parts as files of their own, each with its place in a model of these names.

    Raises AdapterFileError if there are several parts and the model is only one of them.
    """
    groups = _groups(source, names)
    places = [_place(group, names) for group in groups]
    roles = {group.role for group in groups if group.role is not None}
    missing = [place is None and group.role is not None for place, group in zip(places, groups, strict=True)]
    if len(roles) > 1 and any(missing):
        raise _several(source, groups)
    for group, place in zip(groups, places, strict=True):
        yield replace(
            source,
            tensors=group.tensors,
            config=source.config_of(group.prefix),
            headers={},
            written=group.written,
            place=place or "",
            config_name=HEADER,
        )


def _groups(source: Source, names: Collection[str]) -> list[_Group]:
    """The tensors by the prefix of their part. Where one config is for all, a child of the model is no part."""
    known: dict[str, _Role | None] = {**dict.fromkeys(source.headers, None), **_PREFIXES}
    ordered = sorted(known, key=len, reverse=True)
    if "" in source.headers:
        ordered = [prefix for prefix in ordered if prefix.rstrip("._") not in names]
    groups: dict[str, _Group] = {}
    for key, tensor in source.tensors.items():
        prefix = next((prefix for prefix in ordered if key.startswith(prefix)), "")
        group = groups.setdefault(prefix, _Group(prefix, known.get(prefix)))
        rest = key[len(prefix) :]
        group.tensors[rest], group.written[rest] = tensor, source.called(key)
    return list(groups.values())


def _place(group: _Group, names: Collection[str]) -> str | None:
    """The child of the model that a part belongs to, with its dot; None where the model has none."""
    children = (group.prefix.rstrip("."), *(group.role.children if group.role else ()))
    return next((f"{child}." for child in children if child and child in names), None)


def _several(source: Source, groups: Iterable[_Group]) -> AdapterFileError:
    known = [(_ROLES.index(group.role), group.prefix) for group in groups if group.role is not None]
    roles = [_ROLES[place] for place in sorted({place for place, _ in known})]
    prefixes = " and ".join(f"'{prefix}'" for _, prefix in sorted(known))
    children = ", ".join(f'"{role.children[0]}": {role.children[0]}' for role in roles)
    fix = f"Load it onto `torch.nn.ModuleDict({{{children}}})`, which takes them all, and call its parts."
    return source.refuse("adapted models", "one, which this model is", prefixes, fix)


def named_parts(
    root: nn.Module, layers: Iterable[str], flat: bool, denoiser: str | None = None
) -> dict[str, tuple[str, str]] | Problem:
    """For each layer the prefix of the part of a pipeline that it is in, and its name in that part.

    A `ModuleDict` whose children have the names of parts is a pipeline of them; any other model is one part. `denoiser`
    is the prefix of a denoiser, if it is not that of diffusers or kohya. Returns a Problem if two parts would have the
    same prefix.
    """
    roles = {child: role for role in _ROLES for child in role.children}
    heads = {layer: layer.partition(".")[0] for layer in layers}
    if isinstance(root, nn.ModuleDict) and all(head in roles for head in heads.values()):
        numbered = any(roles[head].children[0] == "te2" for head in heads.values())
        prefixes = {head: _prefix(roles[head], flat, denoiser, head, numbered) for head in heads.values()}
        if len({*prefixes.values()}) < len(prefixes):
            what, expected = "prefixes of the model's parts", "one for each"
            same = " and ".join(f"'{prefix}' for '{head}'" for head, prefix in prefixes.items())
            return Problem(what, expected, same, "Attach, and save, each part for itself.")
        return {layer: (prefixes[head], layer[len(head) + 1 :]) for layer, head in heads.items()}
    kind = type(root).__name__
    prefix = _prefix(_TEXT if "text" in kind.lower() else _UNET, flat, denoiser, kind, False)
    return {layer: (prefix, layer) for layer in heads}


def _prefix(role: _Role, flat: bool, denoiser: str | None, name: str, numbered: bool) -> str:
    """The prefix to write. diffusers has one for a U-Net, by its `name`, and one for every other denoiser."""
    if role is _UNET and denoiser is not None:
        return denoiser
    if role is _UNET and not flat:
        return "unet." if "unet" in name.lower() else "transformer."
    if role is _TEXT and flat and numbered:  # the first of two
        return "lora_te1_"
    return (role.flat or _UNET.flat if flat else role.dotted)[0]
