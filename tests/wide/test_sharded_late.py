"""Adapters that join a model which is sharded already, against those that were there before, and one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import (
    Experts,
    adapted,
    attach,
    base,
    changed,
    cores,
    everyones,
    late,
    losses,
    mean,
    optimiser,
    rows,
    run,
    sharded,
)
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tnpeft
from tnpeft.adapters.inits import OF_WEIGHT

MODES = ("dense", "factored", "hybrid", "auto")
LATE = ("layers", "blocks", "blocks alone", "whole")
EVERYTHING = {"train": {"norm": True, "bias": "adapted"}}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
SPECS = sorted(path.stem for path in (Path(__file__).parents[2] / "specs").glob("*.yaml"))

close = functools.partial(torch.testing.assert_close, rtol=2e-6, atol=1e-6)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def trains(model: nn.Module, spec: str, mode: str = "auto", conv: bool = False, **options: Any) -> None:
    """Holds the losses of a model to those of one process."""
    wanted = losses(adapted(spec, mode, conv, **options), *everyones(conv))
    close(mean(losses(model, *rows(conv))), wanted, msg=lambda text: f"{spec}, {mode}, {options}: {text}")


def _trains(_folder: Path, cases: list[tuple[str, str, bool, str, dict[str, Any]]]) -> None:
    for spec, mode, conv, way, options in cases:
        trains(late(spec, mode, conv, way, **options), spec, mode, conv, **options)


def test_modes(tmp_path: Path):
    ways = [*LATE, *LATE[1:], LATE[0]]  # each mode with two
    run(
        _trains,
        2,
        tmp_path,
        [("lora", mode, False, way, EVERYTHING) for mode, way in zip(MODES * 2, ways, strict=True)],
    )
    run(_trains, 3, tmp_path, [(spec, "auto", False, "blocks", {}) for spec in ("lora", "dora", "metatt")])


def kind(spec: tnpeft.Spec) -> tuple[object, ...]:
    """What of a spec says how its cores get their values and gradients."""
    cores = spec.cores
    made = [any(core.derivation is not None for core in cores), any(core.is_index for core in cores)]
    read = [any(core.origin is not None for core in cores), any(core.init.name in OF_WEIGHT for core in cores)]
    held = [any(core.shared is not None for core in cores), any(core.frozen for core in cores)]
    return ("Linear" in spec.layers, spec.start, spec.compose, *made, *read, *held)


def test_a_spec_of_each_kind(tmp_path: Path):
    specs = [*map(tnpeft.load_spec, SPECS)]
    first = {kind(spec): spec for spec in reversed(specs) if {"Linear", "Conv3d"} & {*spec.layers}}
    cases = [
        (spec.name, "auto", "Linear" not in spec.layers, "layers" if number % 2 else "blocks", {})
        for number, spec in enumerate(first.values())
    ]
    run(_trains, 2, tmp_path, cases)


def _is_saved(folder: Path) -> None:
    x, y = rows()
    for way, cases in {
        "layers": (("lora", EVERYTHING), ("dora", {})),
        "blocks": (("metatt", {}), ("paca", {}), ("randlora", {})),
        "whole": (("mpo", EVERYTHING),),
    }.items():
        for spec, options in cases:
            model, file = late(spec, way=way, **options), folder / f"{spec}-{way}"
            losses(model, x, y)
            tnpeft.save(model, file)
            whole, other = base(), sharded(base(), way)
            for each in (whole, other):
                tnpeft.load(each, file)
                with torch.no_grad():
                    close(each(x), model(x))
            close(mean(losses(other, x, y)), losses(whole, *everyones()))
            tnpeft.load(other, file)  # in place
            tnpeft.load(other, file, "second")
            with torch.no_grad():
                close(other(x), model(x))
            tnpeft.activate(other, {"default": 0.5, "second": 0.5})
            with torch.no_grad():
                close(other(x), model(x), rtol=1e-5, atol=1e-5) if spec in ("lora", "metatt") else other(x)
            losses(other, x, y, 1)
            with tnpeft.disabled(other), torch.no_grad():
                assert torch.equal(other(x), sharded(base(), way)(x))
            tnpeft.detach(other)
            with torch.no_grad():
                assert torch.equal(other(x), sharded(base(), way)(x))
            assert [name for name, _ in other.named_parameters()] == [name for name, _ in base().named_parameters()]


def test_files(tmp_path: Path):
    run(_is_saved, 2, tmp_path)


def _is_foreign(folder: Path) -> None:
    x, y = rows()
    rank = distributed.get_rank()
    for spec in ("lora", "dora"):
        file, other = folder / f"{rank}-{spec}", folder / f"{rank}-{spec}-other"
        for path, seed in ((file, 1), (other, rank)):
            tnpeft.save_foreign(changed(adapted(spec), seed), path, "peft")
        model, whole = sharded(base(), "blocks"), base()
        with pytest.raises(tnpeft.AdapterFileError, match="expected the same in every process, found others in some"):
            tnpeft.load_foreign(model, other)
        with pytest.raises(tnpeft.AdapterFileError, match="found no such file"):
            tnpeft.load_foreign(model, file if rank else folder / "none")
        assert not [*cores(model)]
        for each in (model, whole):
            tnpeft.load_foreign(each, file)
        with torch.no_grad():
            close(model(x), whole(x))
        close(mean(losses(model, x, y)), losses(whole, *everyones()))


def test_files_of_others(tmp_path: Path):
    run(_is_foreign, 2, tmp_path)


def _accumulates(_folder: Path) -> None:
    def train(model: nn.Module, parts: list[tuple[Tensor, Tensor]], sync: bool) -> Tensor:
        adam, found = optimiser(model), []
        for _ in range(3):
            total = torch.zeros(())
            with tnpeft.accumulating(model):
                for number, (x, y) in enumerate(parts):
                    if not sync and isinstance(model, FSDPModule):
                        model.set_requires_gradient_sync(number == len(parts) - 1)
                    loss = (model(x) - y).square().mean() / len(parts)
                    loss.backward()
                    total += loss.detach()
            torch.nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], 0.05)
            adam.step()
            adam.zero_grad()
            found.append(total)
        return torch.stack(found)

    (x, y), (all_x, all_y) = rows(), everyones()
    mine = [(x[part : part + 1], y[part : part + 1]) for part in range(len(x))]
    ours = [(all_x[part :: len(x)], all_y[part :: len(x)]) for part in range(len(x))]
    for spec, way, sync in (("lora", "layers", False), ("lora", "blocks", True), ("metatt", "blocks", False)):
        options = EVERYTHING if spec == "lora" else {}
        wanted = train(adapted(spec, **options), ours, sync)
        close(mean(train(late(spec, way=way, **options), mine, sync)), wanted)


def test_accumulating_and_clipping(tmp_path: Path):
    run(_accumulates, 2, tmp_path)


def _has_policies(_folder: Path) -> None:
    x, y = rows()
    for spec, way in (("lora", "layers"), ("mpo", "whole"), ("dora", "blocks")):
        policy = {"mp_policy": BF16}
        plain, model = sharded(base(), way, **policy), late(spec, way=way, sharding=policy, **EVERYTHING)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x)), (spec, way)
        losses(model, x, y)
        assert {core.grad is None or core.grad.dtype for core in cores(model)} <= {True, torch.float32}
    offload = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts"))
        for spec, options in (("lora", {"mesh": mesh}), ("pissa", {"mesh": mesh, **offload})):
            trains(late(spec, sharding=options, **EVERYTHING), spec, **EVERYTHING)


def test_policies_and_meshes(tmp_path: Path):
    run(_has_policies, 2, tmp_path)


def _joins_others(folder: Path) -> None:
    x, y = rows()
    pair = sharded(adapted("lora", **EVERYTHING), "blocks"), adapted("lora", **EVERYTHING)

    def agree(steps: int = 3) -> None:
        close(mean(losses(pair[0], x, y, steps)), losses(pair[1], *everyones(), steps))

    agree()
    for model in pair:
        tnpeft.attach(model, "tt_lora", match=r"\.[ab]$", name="late", **EVERYTHING)
    agree()
    for scales in ({"default": 1.0, "late": 0.5}, {"late": 2.0}):
        for model in pair:
            tnpeft.activate(model, scales)
        agree()
    for model in pair:  # made of a weight that is seen while nothing acts
        tnpeft.attach(model, "pissa", match=r"\.a$", name="third")
    agree()
    grads = []
    for model, (inputs, wanted) in zip(pair, ((x, y), everyones()), strict=True):
        tnpeft.activate(model, {"default": 0.5, "third": 1.0})
        output = model(inputs)
        with tnpeft.disabled(model), torch.no_grad():
            model(inputs)
        (output - wanted).square().mean().backward()
        grads.append([each.grad for each in model.parameters() if each.grad is not None])
    for found, like in zip(*grads, strict=True):
        close(found.full_tensor(), like)

    model = base()  # of which parts are sharded, and the rest later
    fully_shard(model[0])
    fully_shard([model[1].a, model[1].b])
    attach(model, "lora", **EVERYTHING)
    trains(fully_shard(model), "lora", **EVERYTHING)

    with torch.device("meta"):
        model = sharded(base(), "blocks")
    attach(model, "lora")
    model.to_empty(device="cpu")
    set_model_state_dict(model, base().state_dict(), options=StateDictOptions(full_state_dict=True, strict=False))
    for module in model.modules():
        if hasattr(module, "adapters"):
            module.reset_parameters()
    trains(model, "lora")
    trains_whole_layers(folder)


def trains_whole_layers(folder: Path) -> None:
    x, y = rows()
    train = {"also": [r"0\.b", r"2\.norm"]}
    for way in ("layers", "blocks", "whole"):
        pair = sharded(base(), way), base()
        for model in pair:
            tnpeft.attach(model, "lora", match=r"\.a$", train=train)
        close(mean(losses(pair[0], x, y)), losses(pair[1], *everyones()))
        tnpeft.save(pair[0], folder / way)
        for model in (base(), sharded(base(), way)):
            tnpeft.load(model, folder / way)
            with torch.no_grad():
                close(model(x), pair[0](x))


def test_beside_other_adapters(tmp_path: Path):
    run(_joins_others, 2, tmp_path)


def _has_parameters(folder: Path) -> None:
    def made(way: str) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(Experts())
        for part in {"parts": (model[0].embed, model[0].attention), "block": (model[0],)}.get(way, ()):
            fully_shard(part)
        return model if way == "one" else fully_shard(model)

    def attached(spec: str, mode: str, way: str) -> nn.Sequential:
        model = made(way)
        parameters = {"in_proj_weight$": "o i", r"up$": "e o i", r"down$": "e i o"}
        tnpeft.attach(model, spec, match="embed$", parameters=parameters, mode=mode)
        return model

    generator = torch.Generator().manual_seed(1)
    tokens, y = torch.randint(0, 20, (6, 3), generator=generator), torch.randn(6, 3, 16, generator=generator)
    mine = slice(3 * distributed.get_rank(), 3 * distributed.get_rank() + 3)
    for spec, mode, ways in (
        ("lora", "auto", ("parts", "whole")),
        ("dora", "auto", ("block",)),
        ("tt_lora", "dense", ("block", "parts")),
    ):
        wanted = losses(attached(spec, mode, "one"), tokens, y)
        for way in ways:
            model, file = attached(spec, mode, way), folder / f"{spec}-{mode}-{way}"
            close(mean(losses(model, tokens[mine], y[mine])), wanted)
            tnpeft.save(model, file)
            other = made(way)
            tnpeft.load(other, file)
            with torch.no_grad():
                close(other(tokens), model(tokens))
            tnpeft.detach(other)
            with torch.no_grad():
                assert torch.equal(other(tokens), made(way)(tokens))


def test_parameters(tmp_path: Path):
    run(_has_parameters, 2, tmp_path)


def _stays_a_unit(folder: Path) -> None:
    """What FSDP2 made of a module it stays, whatever acts on it."""

    def units(model: nn.Sequential) -> list[bool]:
        return [isinstance(each, FSDPModule) for each in (model[0].embed, model[1], model[2])]

    for first in (True, False):
        model = nn.Sequential(Experts(), nn.Linear(16, 16), nn.LayerNorm(16))
        steps: list[Callable[[], object]] = [
            lambda model=model: tnpeft.attach(model, "lora", match="embed$|^1$", **EVERYTHING),
            lambda model=model: [fully_shard(each) for each in (model[0].embed, model[1], model[2], model)],
        ]
        for step in steps if first else reversed(steps):
            step()
        assert units(model) == [True] * 3
        for scales in ({"default": 0.5}, {}, {"default": 1.0}):
            tnpeft.activate(model, scales)
            assert units(model) == [True] * 3
            assert model(torch.ones(2, 3, dtype=torch.int64)).isfinite().all()
        tnpeft.detach(model)
        assert units(model) == [True] * 3
        assert model(torch.ones(2, 3, dtype=torch.int64)).isfinite().all()


def test_units(tmp_path: Path):
    run(_stays_a_unit, 2, tmp_path)


def _is_refused(folder: Path) -> None:
    model = base()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensors"))
    for block in model:
        parallelize_module(block, mesh["tensors"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    said = r"`weight`: expected a tensor that is whole while its module runs, found a DTensor.*tensor parallelism"
    with pytest.raises(tnpeft.AttachError, match=said):
        attach(model, "lora")
    for block in model:
        fully_shard(block, mesh=mesh["data"])
    with pytest.raises(tnpeft.AttachError, match=said):
        attach(model, "lora")

    x, y = rows()
    file = folder / f"{distributed.get_rank()}.safetensors"
    other = changed(adapted("lora", **EVERYTHING), 5)
    others = optimiser(other)
    tnpeft.activate(other, {"default": 0.5})
    tnpeft.save(other, file)
    model = sharded(base(), "FSDP1")
    with pytest.raises(
        tnpeft.AttachError, match="Attach to the plain model first, then wrap it; or shard it with `fully_"
    ):
        attach(model, "lora")
    with pytest.raises(tnpeft.AdapterFileError, match="Load the adapter first, then wrap the model"):
        tnpeft.load(model, file)
    model = sharded(adapted("lora", **EVERYTHING), "FSDP1")
    with pytest.raises(tnpeft.AttachError, match="Attach to the plain model first"):
        tnpeft.attach(model, "lora", match=r"\.a$", name="late")
    with pytest.raises(tnpeft.AdapterFileError, match="Load the adapter first, then wrap the model"):
        tnpeft.load(model, file, "late")
    adam = optimiser(model)
    assert tnpeft.scales_of(tnpeft.load(model, file).model) == {"default": 0.5}
    for scale in (0.5, 2.0, 1.0):  # biases and norms are sums, made while their unit is whole
        for each in (model, other):
            tnpeft.activate(each, {"default": scale})
        with torch.no_grad():
            close(model(x), other(x))
        with tnpeft.disabled(model), torch.no_grad():
            close(model(x), base()(x))
        with torch.no_grad():
            close(model(x), other(x))
        close(mean(losses(model, x, y, adam=adam)), losses(other, *everyones(), adam=others))


@pytest.mark.filterwarnings("ignore:.*requires_grad:UserWarning")
def test_what_is_refused_and_fsdp1(tmp_path: Path):
    run(_is_refused, 2, tmp_path)
