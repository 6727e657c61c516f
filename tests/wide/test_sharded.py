"""Sharded models against the same in one process: every shipped spec, every mode, what FSDP offers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sharded import WAYS, Block, adapted, base, cores, everyones, losses, mean, optimiser, rows, run, sharded
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.checkpoint import checkpoint as recomputed

import tnpeft

MODES = ("dense", "factored", "hybrid", "auto")
THOROUGH = ("lora", "loha", "tt_lora", "dora", "vera", "quanta", "metatt", "lotr")
OF_VOLUMES = ("tenvoo_l", "tenvoo_q", "lora")
EVERYTHING = {"train": {"norm": True, "bias": "adapted"}}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
SPECS = sorted(path.stem for path in (Path(__file__).parents[2] / "specs").glob("*.yaml"))

close = functools.partial(torch.testing.assert_close, rtol=2e-6, atol=1e-6)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def kinds(spec: str) -> Iterator[bool]:
    """Whether a spec is for convolutions, for Linear layers, or both: each as `conv`."""
    layers = tnpeft.load_spec(spec).layers
    if "Linear" in layers:
        yield False
    if "Conv3d" in layers:
        yield True


@functools.cache
def in_one_process(spec: str, mode: str, conv: bool, everything: bool = False) -> Tensor:
    """The losses of the model that is whole, on the rows of all."""
    return losses(adapted(spec, mode, conv, **(EVERYTHING if everything else {})), *everyones(conv))


def _trains(_folder: Path, cases: list[tuple[str, str, bool, str]]) -> None:
    for spec, mode, conv, way in cases:
        model = sharded(adapted(spec, mode, conv), way)
        found, wanted = mean(losses(model, *rows(conv))), in_one_process(spec, mode, conv)
        close(found, wanted, msg=lambda text, case=(spec, mode, conv, way): f"{case}: {text}")


def test_modes(tmp_path: Path):
    cases = [(spec, mode, False, way) for spec in THOROUGH for mode in MODES for way in WAYS]
    cases += [(spec, mode, True, way) for spec in OF_VOLUMES for mode in MODES for way in ("blocks", "layers")]
    run(_trains, 2, tmp_path, cases)
    cases = [(spec, "auto", False, way) for spec in THOROUGH for way in WAYS]
    run(_trains, 3, tmp_path, [*cases, *[(spec, "auto", True, "layers") for spec in OF_VOLUMES]])


@pytest.mark.parametrize("part", range(3))
def test_every_shipped_spec(tmp_path: Path, part: int):
    run(_trains, 2, tmp_path, [(spec, "auto", conv, "blocks") for spec in SPECS[part::3] for conv in kinds(spec)])


def _exact(_folder: Path) -> None:
    """T(θ) - T(θ₀) is zero where the two have one dtype."""
    for spec in ("lora", "mpo", "dora", "pissa", "metatt"):
        for mode in MODES:
            for way in ("layers", "blocks", "whole"):
                plain, model = sharded(base(), way, mp_policy=BF16), adapted(spec, mode, **EVERYTHING)
                dtypes: set[torch.dtype] = set()
                model[1].register_forward_hook(
                    lambda block, *_, seen=dtypes: seen.update(core.dtype for core in cores(block))
                )
                model = sharded(model, way, mp_policy=BF16)
                adam = optimiser(model)  # first, for after a forward pass the root's parameters are whole
                x, y = rows()
                with torch.no_grad():
                    assert torch.equal(model(x), plain(x)), (spec, mode, way)
                assert dtypes == {torch.float32}, (spec, mode, way)
                found, wanted = mean(losses(model, x, y, 4, adam)), in_one_process(spec, mode, False, True)
                torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)


def test_mixed_precision(tmp_path: Path):
    run(_exact, 2, tmp_path)


def _saves(folder: Path) -> None:
    offload = CPUOffloadPolicy(pin_memory=False)
    for spec in ("lora", "metatt", "mpo"):
        for way in WAYS[:-1]:
            for options in ({}, {"mp_policy": BF16}, {"offload_policy": offload}) if way != "FSDP1" else ({},):
                model = sharded(adapted(spec, **EVERYTHING), way, **options)
                x, y = rows()
                losses(model, x, y)
                with torch.no_grad():
                    wanted = model(x)  # leaves what the root holds gathered
                file = folder / f"{spec}-{way}-{len(options)}{'mp' if 'mp_policy' in options else ''}.safetensors"
                tnpeft.save(model, file)
                assert file.exists()
                loaded = base()
                tnpeft.load(loaded, file)
                if "mp_policy" not in options:
                    close(loaded(x), wanted)
                again = sharded(loaded, way, **options)
                adam = optimiser(again)
                with torch.no_grad():
                    assert torch.equal(again(x), wanted), (spec, way)
                before = mean(losses(model, x, y, 1))
                close(mean(losses(again, x, y, 1, adam)), before)


def test_save_and_load(tmp_path: Path):
    run(_saves, 2, tmp_path)


def _resumes(folder: Path, steps: int) -> None:
    """Two steps and a checkpoint, or what follows it."""
    for spec in ("lora", "metatt", "dora", "mpo"):
        for way in ("layers", "blocks", "whole"):
            model = sharded(adapted(spec, **EVERYTHING), way)
            adam, place = optimiser(model), folder / f"{spec}-{way}"
            if steps:
                losses(model, *rows(), 2, adam)
                states = dict(zip(("model", "optimiser"), get_state_dict(model, adam), strict=True))
                checkpoint.save(states, checkpoint_id=place)
                full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
                after = mean(losses(model, *rows(), 2, adam))
                if distributed.get_rank() == 0:
                    torch.save(after, place / "after.pt")
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_model_state_dict(model, full if distributed.get_rank() == 0 else {}, options=options)
                close(mean(losses(model, *rows(), 1)), after[:1])
            else:
                states = dict(zip(("model", "optimiser"), get_state_dict(model, adam), strict=True))
                checkpoint.load(states, checkpoint_id=place)
                set_state_dict(model, adam, model_state_dict=states["model"], optim_state_dict=states["optimiser"])
                close(mean(losses(model, *rows(), 2, adam)), torch.load(place / "after.pt"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints_go_on_with_other_numbers_of_processes(tmp_path: Path):
    run(_resumes, 2, tmp_path, 2)
    for processes in (3, 1):
        run(_resumes, processes, tmp_path, 0)


def _habits(_folder: Path) -> None:
    def accumulated(sync: bool) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            total = torch.zeros(())
            with tnpeft.accumulating(model):
                for part in range(3):
                    if not sync and hasattr(model, "set_requires_gradient_sync"):
                        model.set_requires_gradient_sync(part == 2)
                    mine = slice(part, None, 3)  # one row of each process
                    loss = (model(x[mine]) - y[mine]).square().mean() / 3
                    loss.backward()
                    total += loss.detach()
            return total

        return step

    def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            for block in model:
                x = recomputed(block, x, use_reentrant=reentrant)
            loss = (x - y).square().mean()
            loss.backward()
            return loss.detach()

        return step

    def train(model: nn.Module, step: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        adam, found = optimiser(model), []
        for _ in range(3):
            found.append(step(model, x, y))
            adam.step()
            adam.zero_grad()
        return torch.stack(found)

    for spec in ("lora", "metatt", "mpo"):
        for mode in MODES:
            steps = [accumulated(True), accumulated(False), checkpointed(True), checkpointed(False)]
            for number, step in enumerate(steps):
                model = adapted(spec, mode)
                for block in model:
                    fully_shard(block)
                if number < 2:
                    fully_shard(model)
                wanted = train(adapted(spec, mode), step, *everyones())
                close(
                    mean(train(model, step, *rows())),
                    wanted,
                    msg=lambda text, case=(spec, mode, number): f"{case}: {text}",
                )
            model = adapted(spec, mode)
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
            close(mean(losses(sharded_in_order(model), *rows())), in_one_process(spec, mode, False))


def sharded_in_order(model: nn.Module) -> nn.Module:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_accumulating_and_activation_checkpointing(tmp_path: Path):
    run(_habits, 2, tmp_path)


def _switches(folder: Path) -> None:
    x, y = rows()
    file = folder / f"{distributed.get_rank()}.safetensors"
    tnpeft.save(adapted("lora"), file)
    for way in ("layers", "blocks", "whole"):
        for options in ({}, EVERYTHING):
            model, plain = sharded(adapted("lora", **options), way), sharded(base(), way)
            with torch.no_grad():
                wanted = plain(x)
            losses(model, x, y)
            with torch.no_grad(), tnpeft.disabled(model):
                assert torch.equal(model(x), wanted)
            tnpeft.activate(model, {"default": 0.5})
            losses(model, x, y, 1)
            tnpeft.activate(model, {})
            with torch.no_grad():
                assert torch.equal(model(x), wanted)
            tnpeft.activate(model, "default")
            losses(model, x, y, 1)
            with pytest.raises(tnpeft.AttachError, match=re.escape("load it onto the base in one process, and merge")):
                tnpeft.merge(model)
            if way == "blocks":
                with pytest.raises(tnpeft.AttachError, match="Attach to the whole model first, then shard it"):
                    tnpeft.attach(model, "lora", match=r"\.a$", name="late")
            tnpeft.detach(model)
            with torch.no_grad():
                assert torch.equal(model(x), wanted)
            with pytest.raises(tnpeft.AdapterFileError, match="Load the adapter first, then shard the model"):
                tnpeft.load(plain, file)


def _flat(_folder: Path) -> None:
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    x, _ = rows()
    nested = FullyShardedDataParallel(adapted("lora"), auto_wrap_policy=ModuleWrapPolicy([Block]), **options)
    close(mean(losses(nested, *rows())), in_one_process("lora", "auto", False))
    shared = FullyShardedDataParallel(adapted("metatt"), auto_wrap_policy=ModuleWrapPolicy([Block]), **options)
    with pytest.raises(
        tnpeft.ExecutionError, match=r"layer '1\.a': cores that are shared with other layers: expected whole"
    ):
        shared(x)
    narrow = FullyShardedDataParallel(adapted("quanta"), mixed_precision=MixedPrecision(torch.bfloat16), **options)
    with pytest.raises(tnpeft.ExecutionError, match="cores: expected numbers of 32 bits or more, found narrower ones"):
        narrow(x)


@pytest.mark.filterwarnings("ignore:.*requires_grad:UserWarning")
def test_units_of_fsdp1(tmp_path: Path):
    run(_flat, 2, tmp_path)


def test_switching_and_what_is_refused(tmp_path: Path):
    run(_switches, 2, tmp_path)


def _drops_and_has_rows(_folder: Path) -> None:
    x, _ = rows()
    names = ["one", "two", None][: len(x)]
    for way in WAYS:
        for spec, mode in (("lora", "factored"), ("tt_lora", "dense"), ("metatt", "auto")):
            whole, model = (adapted(spec, mode, dropout={"input": 0.2, "bond": 0.2, "module": 0.1}) for _ in range(2))
            outputs = []
            for each in (whole, sharded(model, way)):
                torch.manual_seed(3)
                outputs.append(each(x))
                outputs[-1].square().sum().backward()
            close(outputs[1].detach(), outputs[0].detach())
            whole, model = (adapted(spec, mode, name="one") for _ in range(2))
            for each in (whole, model):
                tnpeft.attach(each, "lora", match=r"\.[ab]$", name="two", seed=7)
                with torch.no_grad():
                    for core in cores(each):
                        core.copy_(torch.linspace(-0.5, 0.5, core.numel()).view(core.shape))
            outputs = []
            for each in (whole, sharded(model, way)):
                with tnpeft.rows(each, names):
                    outputs.append(each(x))
                    outputs[-1].square().sum().backward()
            close(outputs[1].detach(), outputs[0].detach())


def test_dropout_and_rows(tmp_path: Path):
    run(_drops_and_has_rows, 2, tmp_path)
