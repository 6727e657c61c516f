"""Sharded models against the same in one process: every shipped spec, every mode, what FSDP offers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sharded import (
    WAYS,
    Block,
    Experts,
    adapted,
    base,
    changed,
    cores,
    everyones,
    losses,
    mean,
    optimiser,
    rows,
    run,
    sharded,
)
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
FLAT = {"use_orig_params": True, "device_id": torch.device("cpu")}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
SPECS = sorted(path.stem for path in (Path(__file__).parents[2] / "specs").glob("*.yaml"))

close = functools.partial(torch.testing.assert_close, rtol=2e-6, atol=1e-6)
about = functools.partial(torch.testing.assert_close, rtol=0.1, atol=0.1, check_dtype=False)
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


def _switches(_folder: Path) -> None:
    x, y = rows()
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
            tnpeft.detach(model)
            with torch.no_grad():
                assert torch.equal(model(x), wanted)


def _flat(_folder: Path) -> None:
    x, _ = rows()
    nested = FullyShardedDataParallel(adapted("lora"), auto_wrap_policy=ModuleWrapPolicy([Block]), **FLAT)
    close(mean(losses(nested, *rows())), in_one_process("lora", "auto", False))
    shared = FullyShardedDataParallel(adapted("metatt"), auto_wrap_policy=ModuleWrapPolicy([Block]), **FLAT)
    with pytest.raises(
        tnpeft.ExecutionError, match=r"layer '1\.a': cores that are shared with other layers: expected whole"
    ):
        shared(x)
    narrow = FullyShardedDataParallel(adapted("quanta"), mixed_precision=MixedPrecision(torch.bfloat16), **FLAT)
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


def _loads(folder: Path, specs: list[str], act: Callable[..., tnpeft.Handle]) -> None:
    """Values, and the scale, onto models that are sharded and were called; their optimisers go on."""
    offload = CPUOffloadPolicy(pin_memory=False)
    x, y = rows()
    for spec in specs:
        other = changed(adapted(spec, **EVERYTHING), 5)
        tnpeft.activate(other, {"default": 0.5})
        file = folder / f"{spec}-{distributed.get_rank()}.safetensors"
        tnpeft.save(other, file)
        wanted = other(x).detach()
        whole = base()
        tnpeft.load(whole, file)
        wanted_losses = losses(whole, *everyones())
        for way in WAYS[:-1]:
            for options in ({}, {"mp_policy": BF16}, {"offload_policy": offload}) if way != "FSDP1" else ({},):
                case = spec, way, [*options]
                near = about if "mp_policy" in options else close
                model = sharded(adapted(spec, **EVERYTHING), way, **options)
                adam = optimiser(model)
                with torch.no_grad():
                    model(x)
                handle = (tnpeft.hot_swap if way == "FSDP1" else act)(model, file)
                assert tnpeft.scales_of(handle.model) == {"default": 0.5}, case
                with torch.no_grad():
                    near(model(x), wanted, msg=lambda text, case=case: f"{case}: {text}")
                found = mean(losses(model, x, y, adam=adam))
                near(found, wanted_losses, msg=lambda text, case=case: f"{case}: {text}")


def test_loading_in_place(tmp_path: Path):
    run(_loads, 2, tmp_path, ["lora", "metatt"], tnpeft.load)
    run(_loads, 3, tmp_path, ["dora"], tnpeft.hot_swap)
    run(_loads_alone, 2, tmp_path, [spec for spec in SPECS if False in kinds(spec)])


def _loads_alone(folder: Path, specs: list[str]) -> None:
    x, _ = rows()
    for spec in specs:
        file = folder / f"{spec}-{distributed.get_rank()}.safetensors"
        other, model = changed(adapted(spec), 5), sharded(adapted(spec), "blocks")
        tnpeft.save(other, file)
        tnpeft.load(model, file)
        with torch.no_grad():
            close(model(x), other(x), msg=lambda text, spec=spec: f"{spec}: {text}")


def _refuses_files(folder: Path) -> None:
    rank = distributed.get_rank()
    x, _ = rows()
    two = [adapted("lora", **EVERYTHING) for _ in range(2)]
    for model in two:
        tnpeft.attach(model, "lora", match=r"\.[ab]$", name="two", seed=3, **EVERYTHING)
        tnpeft.activate(model, {"default": 0.5, "two": 2.0})
    file, other, narrow = (folder / f"{name}-{rank}" for name in ("file", "other", "narrow"))
    tnpeft.save(changed(adapted("lora", **EVERYTHING), 5), file)
    tnpeft.save(changed(adapted("lora", **EVERYTHING), rank), other)
    tnpeft.save(adapted("lora", r=2, **EVERYTHING), narrow)
    model = sharded(two[0], "blocks")
    with torch.no_grad():
        before = model(x)
    for path, name, error, said in (
        (file if rank else folder / "none", "default", tnpeft.AdapterFileError, "found no such file"),
        (other, "default", tnpeft.AdapterFileError, "expected the same in every process, found others in some"),
        (narrow, "default", tnpeft.AttachError, "expected r=4, alpha=4, found r=2, alpha=2"),
    ):
        with pytest.raises(error, match=said):
            tnpeft.load(model, path, name)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    for each in (model, two[1]):
        tnpeft.hot_swap(each, file, "default")  # biases and norms are sums
    with torch.no_grad():
        close(model(x), two[1](x))
    strange = adapted("lora", **EVERYTHING)
    with torch.no_grad():
        next(strange.parameters()).add_(1)
    with pytest.raises(tnpeft.TnpeftWarning, match="base model: expected the values that the adapter was trained on"):
        tnpeft.load(sharded(strange, "blocks"), file)


def test_what_is_refused_of_files_is_so_in_every_process(tmp_path: Path):
    run(_refuses_files, 2, tmp_path)


def _has_parameters(folder: Path) -> None:
    def made(spec: str, mode: str, seed: int = 0) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(Experts())
        parameters = {"in_proj_weight$": "o i", r"up$": "e o i", r"down$": "e i o"}
        tnpeft.attach(model, spec, match="embed$", parameters=parameters, mode=mode, seed=seed)
        return model

    generator = torch.Generator().manual_seed(1)
    tokens, y = torch.randint(0, 20, (6, 3), generator=generator), torch.randn(6, 3, 16, generator=generator)
    mine = slice(3 * distributed.get_rank(), 3 * distributed.get_rank() + 3)
    for spec, mode in (("lora", "auto"), ("lora", "dense"), ("tt_lora", "auto"), ("dora", "auto"), ("loha", "auto")):
        wanted = losses(made(spec, mode), tokens, y)
        for way in ("parts", "block", "whole", "FSDP1"):
            model = made(spec, mode)
            for part in {"parts": (model[0].embed, model[0].attention), "block": (model[0],)}.get(way, ()):
                fully_shard(part)
            model = FullyShardedDataParallel(model, **FLAT) if way == "FSDP1" else fully_shard(model)
            found = mean(losses(model, tokens[mine], y[mine]))
            close(found, wanted, msg=lambda text, case=(spec, mode, way): f"{case}: {text}")
            if way == "FSDP1":
                continue
            file = folder / f"{spec}-{mode}-{way}.safetensors"
            tnpeft.save(model, file)
            fresh, again = made(spec, mode, 5), fully_shard(made(spec, mode, 5))
            for each in (fresh, again):
                tnpeft.load(each, file)
            with torch.no_grad():
                close(again(tokens), fresh(tokens))
                close(model(tokens), fresh(tokens))


def test_parameters_and_embeddings(tmp_path: Path):
    run(_has_parameters, 2, tmp_path)


def _writes_for_peft(folder: Path) -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Experts(), nn.LayerNorm(16), nn.Linear(16, 4))

    parameters = {r"up$": "e o i", r"down$": "e o i"}
    tokens, y = torch.randint(0, 20, (4, 3)), torch.randn(4, 3, 4)
    model = made()
    tnpeft.attach(model, "lora", match="embed$", parameters=parameters, train={"also": [r"^2\.weight"], "norm": True})
    for part in (*model, model):
        fully_shard(part)
    losses(model, tokens, y)
    for scale in (1.0, 0.5):  # the bias of the head is the base's, and in parts
        tnpeft.activate(model, {"default": scale})
        tnpeft.save_foreign(model, folder / f"{scale}", "peft")
        fresh = made()
        tnpeft.load_foreign(fresh, folder / f"{scale}")
        with torch.no_grad():
            close(fresh(tokens), model(tokens))


def test_folders_of_peft(tmp_path: Path):
    """With embeddings, parameters and modules that are saved whole, of a model in parts."""
    run(_writes_for_peft, 2, tmp_path)
