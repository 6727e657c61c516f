"""What each process would hold, counted without any, against what it does hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sharded import run
from torch import distributed, nn

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import ddpm
from ddpm_lab.config.settings import Base, Method, Model
from ddpm_lab.model.method import apply_method
from ddpm_lab.model.sharding import elements_of_part, shard, units_of, whole_tensors
from ddpm_lab.model.unet import build_unet
from ddpm_lab.training.dry_run import holdings, largest_unit
from typer.testing import CliRunner

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
TINY = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)
METHODS = (
    Method(recipe="tenvoo_l_ddpm", params={"r": 2}),
    Method(recipe="lora_ddpm"),
    Method(kind="full"),
    Method(kind="bias_norm"),
)


def adapted(method: Method) -> nn.Module:
    unet = build_unet(TINY, Base())
    apply_method(unet, method)
    return unet


def command(*arguments: object) -> str:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(ddpm.app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_parts_are_those_of_torch(processes: int) -> None:
    for shape in ((1,), (2, 3), (7, 2, 2), (16, 1)):
        chunks = torch.empty(shape).chunk(processes)
        sizes = [chunk.numel() for chunk in chunks] + [0] * (processes - len(chunks))
        assert [elements_of_part(torch.empty(shape), process, processes) for process in range(processes)] == sizes


def test_shares_add_up_to_the_model() -> None:
    for method in METHODS:
        unet = adapted(method)
        whole = holdings(unet, 1, averaged=True)[0]
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in unet.buffers())
        assert whole.parameters == sum(each.numel() for each in unet.parameters())
        assert whole.trained == sum(each.numel() for each in unet.parameters() if each.requires_grad)
        assert whole.total == 4 * (whole.parameters + 4 * whole.trained) + buffers
        three = holdings(unet, 3, averaged=False)
        assert sum(each.parameters for each in three) == whole.parameters
        assert sum(each.trained for each in three) == whole.trained
        assert all(each.average == 0 for each in three)


def test_every_parameter_is_in_one_unit() -> None:
    unet = adapted(METHODS[0])
    inside = [parameter for unit in units_of(unet) for parameter in unit.parameters()]
    assert len(inside) == len({*inside})
    outside = {name for name, parameter in unet.named_parameters() if parameter not in {*inside}}
    assert {name.partition(".")[0] for name in outside} == {"conv_in", "time_embed", "out"}
    name, size = largest_unit(unet)
    assert size == sum(4 * each.numel() for each in unet.get_submodule(name).parameters())
    assert size == max(sum(4 * each.numel() for each in unit.parameters()) for unit in units_of(unet))


def test_the_papers_model(tmp_path: Path) -> None:
    """166.67 M parameters on four processes, without data, a base or any of the four."""
    said = command("finetune", "--config", CONFIGS / "paper_sharded.yaml", "--out", tmp_path, "--dry-run", 4)
    found = json.loads((tmp_path / "dry-run.json").read_text(encoding="utf-8"))
    assert (found["processes"], found["sharded"], found["micro_batches"]) == (4, True, 1)
    assert sum(rank["trained"] for rank in found["ranks"]) == 601_024
    assert sum(rank["parameters"] for rank in found["ranks"]) == pytest.approx(4 * 41_341_000, rel=1e-3)
    assert "what each of 4 processes holds" in said
    assert "the largest, up_blocks.0.resnets.0, has 87.4 MB" in " ".join(said.split())
    assert [path.name for path in tmp_path.iterdir()] == ["dry-run.json"]


def test_a_model_that_is_not_sharded_is_whole_in_each(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {TINY.model_dump_json()}\n", encoding="utf-8")
    said = command("pretrain", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out", "--dry-run", 2)
    ranks = json.loads((tmp_path / "out" / "dry-run.json").read_text(encoding="utf-8"))["ranks"]
    count = sum(parameter.numel() for parameter in build_unet(TINY).parameters())
    assert [rank["trained"] for rank in ranks] == [count, count]
    assert "Each holds the whole model" in said


def _holds(_folder: Path) -> None:
    """What torch has in this process, and that parts are whole again in the first one alone."""
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    for method in (METHODS[0], METHODS[2]):
        with torch.device("meta"):
            on_meta = adapted(method)
        expected = holdings(on_meta, processes, averaged=False)[rank]
        unet = adapted(method)
        whole = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
        shard(unet, torch.device("cpu"), processes)
        local = [(each.to_local().numel(), each.requires_grad) for each in unet.parameters()]  # type: ignore[operator]
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in unet.buffers())
        assert sum(count for count, _ in local) == expected.parameters
        assert sum(count for count, trains in local if trains) == expected.trained
        assert 4 * expected.parameters + buffers == expected.weights
        again = whole_tensors(dict(unet.named_parameters()))
        assert again.keys() == (whole.keys() if rank == 0 else set())
        assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


@pytest.mark.slow
def test_processes_hold_what_the_dry_run_says(tmp_path: Path) -> None:
    run(_holds, 3, tmp_path)
