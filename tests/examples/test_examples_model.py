"""The driver's U-Net, its checkpoints, its loss and its sampler."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Base, Config, Data, Diffusion, Method, Model, Sampling, Training, Validation
from ddpm_lab.data.order import Source
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.diffusion import HeldOut, noise_schedule, predict
from ddpm_lab.model.method import apply_method, check_method
from ddpm_lab.model.unet import build_unet, load_base, recompute_activations, save_weights
from ddpm_lab.sampling.draw import check_sampling, draw_samples
from ddpm_lab.support.faults import LabError
from ddpm_lab.training.train import steps_of, train

from tnpeft.program import counting

TINY = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)


def tiny(seed: int = 0) -> torch.nn.Module:
    """A U-Net of two levels whose output is not zero, as a trained one's."""
    unet = build_unet(TINY, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in unet.out.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


def test_the_papers_model_has_the_papers_size() -> None:
    with torch.device("meta"):
        unet = build_unet(Model())
        old = build_unet(Model(), Base(old_generative=True))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 166_669_313
    assert sum(parameter.numel() for parameter in old.parameters()) == 164_764_417


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"attention_levels": (True,)},
            "model.attention_levels: its length: expected 2 values, as `channels` has, found 1. Add or remove.",
        ),
        (
            {"norm_groups": 3},
            "model.channels: channels: expected multiples of `norm_groups`, 3, found [8, 8]. Change either.",
        ),
        (
            {"head_channels": (0, 0)},
            "model.head_channels: channels of a head: expected divisors of `channels` where a level attends, and on "
            "the last level (the middle block attends), found [0, 0]. Change them.",
        ),
        (
            {"head_channels": (0, 3)},
            "model.head_channels: channels of a head: expected divisors of `channels` where a level attends, and on "
            "the last level (the middle block attends), found [0, 3]. Change them.",
        ),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(LabError) as excinfo:
        build_unet(TINY.model_copy(update=changes))
    assert str(excinfo.value) == expected


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_checkpoints_load_whatever_they_are_wrapped_in(tmp_path: Path, suffix: str) -> None:
    unet, path = tiny(1), tmp_path / f"base{suffix}"
    state = unet.state_dict()
    if suffix == ".safetensors":
        save_weights(unet, path)
    elif suffix == ".pt":
        torch.save(state, path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    other = tiny(2)
    load_base(other, Base(checkpoint=path))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def refused(unet: torch.nn.Module, base: Base) -> list[str]:
    """The lines `load_base` says, after checking that it left the model as it was."""
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(LabError) as excinfo:
        load_base(unet, base)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    return str(excinfo.value).splitlines()


def test_a_checkpoint_of_another_model_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(build_unet(TINY.model_copy(update={"channels": (8, 16), "head_channels": (0, 16)})), path)
    (line,) = refused(tiny(), Base(checkpoint=path))
    assert line.startswith(f"{path}: the base's tensors: expected the 142 of this model, found ")
    assert "of other sizes (`down_blocks.1.attentions.0.norm.weight`, " in line
    assert "; the first 16 for 8)" in line
    assert line.endswith(". Give the checkpoint of this model, or set `model` to the checkpoint's.")


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    state = dict(tiny().state_dict())
    del state["out.2.conv.bias"]
    save_file({**state, "extra": torch.zeros(2, 3)}, path)
    fix = "Give the checkpoint of this model, or set `model` to the checkpoint's."
    assert refused(tiny(), Base(checkpoint=path)) == [
        f"{path}: tensor `out.2.conv.bias`: expected 1, found no such tensor. {fix}",
        f"{path}: tensor `extra`: expected no such tensor, found 2x3. {fix}",
    ]


def test_files_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    gone, text, listed = tmp_path / "gone.pt", tmp_path / "text.safetensors", tmp_path / "list.pt"
    text.write_text("hello", encoding="utf-8")
    torch.save([1, 2], listed)
    assert refused(tiny(), Base(checkpoint=gone)) == [
        f"{gone}: `base.checkpoint`: expected a file, found nothing there. Check the path."
    ]
    (line,) = refused(tiny(), Base(checkpoint=text))
    assert line.startswith(f"{text}: `base.checkpoint`: expected a safetensors file or a state dict, found ")
    (line,) = refused(tiny(), Base(checkpoint=listed))
    assert line.startswith(f"{listed}: `base.checkpoint`: expected a mapping of names to tensors, found list. ")


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    path, witness = tmp_path / "evil.pt", tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (witness,)

    torch.save({"a": Evil()}, path)
    (line,) = refused(tiny(), Base(checkpoint=path))
    assert line.startswith(f"{path}: `base.checkpoint`: expected a safetensors file or a state dict, found ")
    assert not witness.exists()


def as_old(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that the monai-generative class would have: attention without `attn`, `conv` after upsampling."""
    state = {}
    for name, value in unet.state_dict().items():
        state[name.replace(".attn.to_", ".to_").replace("postconv", "conv")] = value
        if name.endswith(".attn.to_q.weight"):
            for part, size in (("weight", value.shape), ("bias", value.shape[:1])):
                state[name.replace(".attn.to_q.weight", f".proj_attn.{part}")] = torch.zeros(size)
    return state


def test_old_checkpoints_load_when_asked(tmp_path: Path) -> None:
    base = Base(checkpoint=tmp_path / "old.pt", old_generative=True)
    source = build_unet(TINY, base, seed=1)
    torch.save(as_old(source), base.checkpoint)
    unet = build_unet(TINY, base, seed=2)
    load_base(unet, base)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in unet.state_dict().items())
    lines = refused(tiny(), Base(checkpoint=base.checkpoint))
    assert lines[0].endswith("It was written with monai-generative: pass `--set base.old_generative=true`.")


def test_an_old_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    base = Base(checkpoint=tmp_path / "old.pt", old_generative=True)
    state = as_old(build_unet(TINY, base))
    torch.save({name: value for name, value in state.items() if "to_q" not in name}, base.checkpoint)
    (line,) = refused(build_unet(TINY, base), base)
    assert line == (
        f"{base.checkpoint}: the base's tensors: expected the 134 of this model without `attn.out_proj`, found 8 "
        "missing (`down_blocks.1.attentions.0.to_q.weight`, `down_blocks.1.attentions.0.to_q.bias`, "
        "`middle_block.attention.to_q.weight` and 5 more). "
        "Give the checkpoint of this model, or set `model` to the checkpoint's."
    )
    torch.save({name: value for name, value in state.items() if name != "conv_in.conv.weight"}, base.checkpoint)
    (line,) = refused(build_unet(TINY, base), base)
    assert line == (
        f"{base.checkpoint}: tensor `conv_in.conv.weight`: expected 8x1x3x3x3, found no such tensor. "
        "Give the checkpoint of this model, or set `model` to the checkpoint's."
    )
    torch.save(tiny().state_dict(), base.checkpoint)
    (line,) = refused(build_unet(TINY, base), base)
    assert line.endswith("It was written with MONAI itself: pass `--set base.old_generative=false`.")
    torch.save({**state, "extra": torch.zeros(1)}, base.checkpoint)
    (line,) = refused(build_unet(TINY, base), base)
    assert line == (
        f"{base.checkpoint}: tensor `extra`: expected no such tensor, found 1. "
        "Give the checkpoint of this model, or set `model` to the checkpoint's."
    )


def test_recomputed_activations_change_no_gradient() -> None:
    plain, frugal = tiny(), tiny()
    recompute_activations(frugal)
    volumes = torch.rand((2, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    for unet in (plain, frugal):
        unet(volumes, timesteps=torch.tensor([3, 700])).square().mean().backward()
    for one, two in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_is_the_noise_or_the_velocity(prediction: str) -> None:
    scheduler = noise_schedule(Diffusion(prediction=prediction))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 3, 1, 8, 8, 8), generator=generator)
    timesteps = torch.tensor([0, 500, 999])
    seen, target = predict(lambda x, timesteps: x, scheduler, clean, noise, timesteps)  # type: ignore[arg-type]
    alpha = torch.cumprod(1 - torch.linspace(0.0005**0.5, 0.0195**0.5, 1000) ** 2, 0)[timesteps].view(3, 1, 1, 1, 1)
    torch.testing.assert_close(seen, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, rtol=1e-4, atol=1e-4)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    torch.testing.assert_close(target, noise if prediction == "epsilon" else velocity, rtol=1e-4, atol=1e-4)


def test_the_held_out_error_is_repeatable_and_has_buckets() -> None:
    volumes = list(torch.rand((3, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)))
    held_out = HeldOut(volumes, noise_schedule(Diffusion()), Validation(buckets=5, draws=2), batch_size=4)
    unet = tiny().train()
    one, two = (held_out.error_of(held_out.errors(unet)) for _ in range(2))
    assert one == two
    assert unet.training
    assert len(one.buckets) == 5
    assert one.mean == pytest.approx(sum(one.buckets) / 5)
    assert one.change(two) == 0
    assert held_out.evaluations == 30


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_samples_depend_on_the_seed_and_stay_in_range(scheduler: str) -> None:
    diffusion = Diffusion(timesteps=10, prediction="v_prediction")
    sampling = Sampling(scheduler=scheduler, steps=10, count=3, batch_size=2)  # type: ignore[arg-type]
    unet = tiny()
    one = draw_samples(unet, (8, 8, 8), diffusion, sampling, Data())
    two = draw_samples(unet, (8, 8, 8), diffusion, sampling, Data())
    other = draw_samples(unet, (8, 8, 8), diffusion, sampling.model_copy(update={"seed": 1}), Data())
    assert one.shape == (3, 1, 8, 8, 8)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0 <= one.min() <= one.max() <= 1
    assert not torch.equal(one[0], one[1])
    if scheduler == "ddim":
        batched = draw_samples(unet, (8, 8, 8), diffusion, sampling.model_copy(update={"batch_size": 3}), Data())
        torch.testing.assert_close(batched, one, rtol=1e-3, atol=1e-4)


def test_impossible_numbers_of_sampling_steps_are_refused() -> None:
    with pytest.raises(LabError) as excinfo:
        check_sampling(Diffusion(), Sampling(steps=1001))
    assert str(excinfo.value) == (
        "sampling.steps: the number of steps: expected at most 1000, `diffusion.timesteps`, found 1001. Take fewer."
    )
    with pytest.raises(LabError) as excinfo:
        check_sampling(Diffusion(), Sampling(scheduler="ddpm", steps=50))
    assert str(excinfo.value) == (
        "sampling.steps: the number of steps: expected 1000, all of them, with ddpm, found 50. Use ddim for fewer."
    )


def test_the_length_of_training() -> None:
    assert steps_of(Training(steps=7), 100) == 7
    assert steps_of(Training(epochs=2, batch_size=3, accumulation=4), 25) == 2 * 2
    assert steps_of(Training(epochs=1, batch_size=2, accumulation=1), 9, processes=2) == 2
    for training, found in ((Training(), "neither"), (Training(steps=1, epochs=1), "both")):
        with pytest.raises(LabError) as excinfo:
            steps_of(training, 10)
        assert str(excinfo.value) == (
            f"training: its length: expected `steps` or `epochs`, found {found}. Give one of the two."
        )


def test_cores_are_contracted_once_for_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = list(torch.rand((8, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)))
    training = Training(steps=2, accumulation=4, learning_rate=1e-3, precision="fp32", device="cpu")

    def trained() -> tuple[int, dict[str, torch.Tensor]]:
        unet = tiny()
        apply_method(unet, Method(spec="tenvoo_l", match=r"conv[12]\.conv$", mode="dense"))
        with counting() as counts:
            train(unet, Source(volumes), noise_schedule(Diffusion()), training, make_accelerator(training))
        return len(counts["deltas"]), unet.state_dict()

    kept, found = trained()
    monkeypatch.setattr("tnpeft.accumulating", lambda _: contextlib.nullcontext())
    anew, expected = trained()
    assert anew == 4 * kept
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_precisions_and_processes_a_machine_does_not_have() -> None:
    with pytest.raises(LabError) as excinfo:
        make_accelerator(Training(precision="fp16", device="cpu"))
    assert str(excinfo.value) == (
        "training.precision: the precision: expected fp32 or bf16 on a CPU, found fp16. Use `auto`."
    )
    with pytest.raises(LabError) as excinfo:
        make_accelerator(Training(processes=2, precision="fp32", device="cpu"))
    assert str(excinfo.value) == (
        "training.processes: the processes: expected 2, found 1. "
        "Start the driver with `torchrun --nproc_per_node 2 examples/ddpm.py ...`."
    )


def test_runs_of_other_precisions_may_follow_in_one_process() -> None:
    """As in a study: accelerate itself refuses the second."""
    for precision, mixed, steps in (("fp32", "no", 4), ("bf16", "bf16", 2), ("fp32", "no", 1)):
        training = Training(precision=precision, device="cpu", accumulation=steps)  # type: ignore[arg-type]
        accelerator = make_accelerator(training)
        assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == (mixed, steps)
        with accelerator.autocast():
            assert torch.is_autocast_enabled("cpu") == (mixed == "bf16")


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_a_model_that_accelerate_would_shard_is_refused(
    variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(LabError) as excinfo:
        make_accelerator(Training(precision="fp32", device="cpu"))
    assert str(excinfo.value) == (
        "accelerate's configuration: several processes: expected none that shards the model, for the driver does "
        f"(FSDP2), found {name} ({variable}). Start the driver with `torchrun`, without {variable}, and set "
        "`distributed.shard=block`."
    )
    monkeypatch.setenv(variable, "false")
    assert make_accelerator(Training(precision="fp32", device="cpu")).num_processes == 1


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method(), "method: the adapter: expected `recipe` or `spec`, found neither. Give one of the two."),
        (
            Method(recipe="a", spec="b"),
            "method: the adapter: expected `recipe` or `spec`, found both. Give one of the two.",
        ),
        (
            Method(spec="lora"),
            "method.match: the layers of a spec: expected a regular expression, found nothing. "
            "Give the regular expression of the layers to adapt.",
        ),
        (
            Method(kind="bias_norm", match="("),
            "method.match: the layers: expected a regular expression, found missing ), unterminated subpattern at "
            "position 0. Mend it.",
        ),
        (
            Method(kind="bias_norm"),
            "base.checkpoint: the base of method `bias_norm`: expected a pretrained model's checkpoint, found nothing. "
            "Pass `--set base.checkpoint=FILE`, or train from nothing with `--set method.kind=full`.",
        ),
    ],
)
def test_methods_that_do_not_fit_together(method: Method, expected: str) -> None:
    with pytest.raises(LabError) as excinfo:
        check_method(method, Base())
    assert str(excinfo.value) == expected


def test_the_baselines_train_what_they_say() -> None:
    unet = tiny()
    trained = apply_method(unet, Method(kind="bias_norm"))
    names = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained.parameters == sum(unet.get_parameter(name).numel() for name in names)
    assert "down_blocks.0.resnets.0.conv1.conv.bias" in names
    assert "down_blocks.0.resnets.0.norm1.weight" in names
    assert "conv_in.conv.bias" not in names, "only biases of layers that the paper adapts"
    assert not any(name.startswith("middle_block") and "norm" not in name for name in names)
    full = apply_method(unet, Method(kind="full"))
    assert full.parameters == full.total == trained.total
    with pytest.raises(LabError) as excinfo:
        apply_method(unet, Method(kind="bias_norm", match="nothing"))
    assert str(excinfo.value) == (
        "method.match: the layers: expected at least one layer with a bias, found none for 'nothing'. "
        "Compare it with `unet.named_modules()`."
    )


def test_the_defaults_are_the_papers() -> None:
    config = Config()
    assert config.diffusion.prediction == "epsilon"
    assert (config.training.learning_rate, config.training.batch_size, config.training.accumulation) == (1e-5, 1, 4)
