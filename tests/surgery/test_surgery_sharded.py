"""Models that FSDP shards, after attaching or before: trained as in one process, saved by one. More in tests/wide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sharded import adapted, base, changed, cores, everyones, late, losses, mean, optimiser, rows, run, sharded
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy

import tnpeft


def _trains_and_saves(folder: Path) -> None:
    x, y = rows()
    everything = {"train": {"norm": True, "bias": "adapted"}}
    for spec, mode, way in (("lora", "factored", "layers"), ("metatt", "dense", "blocks")):
        whole, model = (adapted(spec, mode, **everything) for _ in range(2))
        model = sharded(model, way)
        wanted = losses(whole, *everyones())
        torch.testing.assert_close(mean(losses(model, x, y)), wanted, rtol=1e-6, atol=1e-6)
        tnpeft.save(model, folder / f"{spec}.safetensors")  # it is there for all once any of them returns
        loaded = base()
        tnpeft.load(loaded, folder / f"{spec}.safetensors")
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)


def _refuses_in_all(folder: Path) -> None:
    model = sharded(adapted("lora"), "blocks")
    path = folder / ("missing/x.safetensors" if distributed.get_rank() == 0 else "never.safetensors")
    with pytest.raises(tnpeft.AdapterFileError, match="Choose a folder that exists") as excinfo:
        tnpeft.save(model, path)
    assert "missing" in str(excinfo.value)  # what the first one says
    assert not (folder / "never.safetensors").exists()


def _loads_in_place(folder: Path) -> None:
    x, y = rows()
    everything = {"train": {"norm": True, "bias": "adapted"}}
    file, mine = (folder / f"{name}-{distributed.get_rank()}.safetensors" for name in ("values", "mine"))
    other = changed(adapted("dora", **everything), 5)
    tnpeft.save(other, file)
    model = sharded(adapted("dora", **everything), "blocks")
    adam = optimiser(model)
    with torch.no_grad():
        before = model(x)  # leaves what the root holds gathered
    tnpeft.save(changed(adapted("dora", **everything), distributed.get_rank()), mine)
    missing = file if distributed.get_rank() else folder / "none"
    for wrong, said in ((missing, "found no such file"), (mine, "expected the same in every process")):
        with pytest.raises(tnpeft.AdapterFileError, match=said):
            tnpeft.load(model, wrong)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    tnpeft.load(model, file)
    torch.testing.assert_close(model(x).detach(), other(x).detach(), rtol=1e-6, atol=1e-6)
    wanted = losses(other, *everyones())
    torch.testing.assert_close(mean(losses(model, x, y, adam=adam)), wanted, rtol=1e-6, atol=1e-6)


def _joins_late(folder: Path) -> None:
    x, y = rows()
    everything = {"train": {"norm": True, "bias": "adapted"}}
    for spec, mode, way in (("lora", "factored", "layers"), ("dora", "dense", "blocks")):
        model, whole = late(spec, mode, way=way, **everything), adapted(spec, mode, **everything)
        plain = sharded(base(), way)
        with torch.no_grad():
            before = plain(x)
            assert torch.equal(model(x), before)
        wanted = losses(whole, *everyones())
        torch.testing.assert_close(mean(losses(model, x, y)), wanted, rtol=1e-6, atol=1e-6)
        tnpeft.save(model, folder / f"late-{spec}.safetensors")
        loaded = base()
        for each in (loaded, plain):
            tnpeft.load(each, folder / f"late-{spec}.safetensors")
            with torch.no_grad():
                torch.testing.assert_close(each(x), model(x), rtol=1e-6, atol=1e-6)
        wanted = losses(loaded, *everyones())
        torch.testing.assert_close(mean(losses(plain, x, y)), wanted, rtol=1e-6, atol=1e-6)
        tnpeft.detach(plain)
        with torch.no_grad():
            assert torch.equal(plain(x), before)


def _is_attached_alike(_folder: Path) -> None:
    model = sharded(base(), "blocks")
    for options, said in (
        ({"match": r"\.a$", "seed": distributed.get_rank()}, "attach: expected the same in every process that holds"),
        ({"match": r"\.a$" if distributed.get_rank() else r"\.z$"}, "expected at least one layer, found none"),
    ):
        with pytest.raises(tnpeft.AttachError, match=said):
            tnpeft.attach(model, "lora", **options)
    assert not [*cores(model)]


def _stays_wide(_folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    plain, model = sharded(base(), "blocks", mp_policy=policy), adapted("mpo", train={"norm": True})
    model = sharded(model, "blocks", mp_policy=policy)
    x, y = rows()
    dtypes = []
    model[1].register_forward_hook(lambda *_: dtypes.extend(core.dtype for core in cores(model[1])))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))  # T(θ) - T(θ₀) with θ in bf16 is not zero
    assert set(dtypes) == {torch.float32}
    losses(model, x, y)
    assert {core.grad is None or core.grad.dtype for core in cores(model)} <= {True, torch.float32}


def _serves_without_keeping(_folder: Path) -> None:
    x, _ = rows()
    for way in ("blocks", "FSDP1"):
        model = sharded(changed(adapted("lora"), 3), way)
        with torch.no_grad():
            expected = model(x)
            with tnpeft.serving(model) as kept:
                for _ in range(2):
                    torch.testing.assert_close(model(x), expected)
                assert (kept.layers, kept.bytes, len(kept.others)) == ([], 0, 6)


def _all(folder: Path) -> None:
    _trains_and_saves(folder)
    _refuses_in_all(folder)
    _loads_in_place(folder)
    _stays_wide(folder)
    _joins_late(folder)
    _is_attached_alike(folder)
    _serves_without_keeping(folder)


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    run(_all, 2, tmp_path)
