"""Other libraries' files that are damaged or of another kind, and adapters that they cannot hold: each whole text."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign import Net, X, adapted, loaded, move
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import bits, same_bits
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AdapterFileError, AttachError
from tnpeft.io.foreign.tuner_rows import METHODS as PEFT_TUNERS

MADE_FOR = "Load the file onto the model it was made for."
INCOMPLETE = "The file is incomplete: copy it again, or save the adapter once more."
METHODS = (
    "LoRA, LoHa and LoKr of PEFT, LyCORIS, diffusers, kohya and ComfyUI, or TenVOO, QuanTA, LoCon, LoHa and LoKr of "
    "the TenVOO paper"
)
TUNERS = ", ".join(("LORA", "LOHA", "LOKR", *PEFT_TUNERS))
ELSEWHERE = "Convert such adapters with the library that made them."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA of rank 2 on `line` and `conv2`, in PEFT's folder."""
    tnpeft.save_foreign(adapted("lora", "line|conv2", r=2, alpha=3), tmp_path / "peft", "peft")
    return tmp_path / "peft"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The same in LyCORIS's file."""
    tnpeft.save_foreign(adapted("lora", "line|conv2", r=2, alpha=3), tmp_path / "lycoris.safetensors", "lycoris")
    return tmp_path / "lycoris.safetensors"


def refused(
    path: Path, error: type[Exception] = AdapterFileError, base: nn.Module | None = None, **options: Any
) -> str:
    """The text of the error, the model left as it was."""
    model = Net() if base is None else base
    before, modules = bits(model), list(model.modules())
    with pytest.raises(error) as excinfo:
        tnpeft.load_foreign(model, path, **options)
    assert same_bits(bits(model), before)
    assert [*map(id, model.modules())] == [*map(id, modules)]
    return str(excinfo.value).replace(str(path), "PATH")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the config, or the tensors, of a file in place."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


LINE = "base_model.model.line"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "method": (
        {"peft_type": "POLY"},
        f"PATH: `peft_type`: expected one of {TUNERS}, found 'POLY'. {ELSEWHERE}",
    ),
    "no method": (
        {"peft_type": None},
        f"PATH: `peft_type`: expected one of {TUNERS}, found None. {ELSEWHERE}",
    ),
    "corda": (
        {"init_lora_weights": "corda"},
        "PATH: `init_lora_weights`: expected an init that leaves the base weights alone, found 'corda'. "
        "PEFT changes the base weights then: save it with `path_initial_model_for_weight_conversion`.",
    ),
    "other maths": (
        {"layer_replication": [[0, 2]]},
        "PATH: `layer_replication`: expected no such option, found [[0, 2]]. "
        "Such updates are not in the language of specs: merge the adapter with PEFT instead.",
    ),
    "rank": (
        {"r": 3},
        "PATH: layer 'conv2': rank: expected 3, as `adapter_config.json` has it, found 2. "
        "Keep the config and the tensors of one adapter together.",
    ),
    "no rank": (
        {"r": 0},
        "PATH: `r` of the PEFT config: expected a positive number, found 0. Mend `adapter_config.json`.",
    ),
    "alpha": (
        {"lora_alpha": "a"},
        "PATH: `alpha` of the PEFT config: expected a finite number, found 'a'. Mend `adapter_config.json`.",
    ),
    "huge": (
        {"lora_alpha": 10**400},
        "PATH: `alpha` of the PEFT config: expected a finite number, found 1000000000000000000000000000000000000000"
        "0000000000000000000000000000000000000...00. Mend `adapter_config.json`.",
    ),
    "patterns": (
        {"rank_pattern": [1]},
        "PATH: `rank_pattern`: expected a mapping, found [1]. Mend `adapter_config.json`.",
    ),
    "expression": (
        {"alpha_pattern": {"(": 1}},
        "PATH: `alpha_pattern`: expected regular expressions, found '(': missing ), unterminated subpattern at "
        "position 7. Mend `adapter_config.json`.",
    ),
    "dora": (
        {"use_dora": True},
        "PATH: layer 'conv2': tensors: expected `lora_magnitude_vector` beside "
        f"'base_model.model.conv2.lora_A.weight', found no such tensor. {INCOMPLETE}",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, folder: Path):
    change, text = CONFIGS[case]
    edit(folder / "adapter_config.json", lambda config: config.update(change))
    found = refused(folder)
    assert found == text or (case == "huge" and found.startswith(text[:100]))


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: tensor})


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no B": (
        lambda tensors: tensors.pop(f"{LINE}.lora_B.weight"),
        f"PATH: layer 'line': tensors: expected `lora_B` beside '{LINE}.lora_A.weight', found no such tensor. "
        + INCOMPLETE,
    ),
    "no such layer": (
        rename(f"{LINE}.lora_A.weight", "base_model.model.lime.lora_A.weight"),
        "PATH: tensor 'base_model.model.lime.lora_A.weight': expected a layer of this model, found no such layer. "
        + MADE_FOR,
    ),
    "no layer to adapt": (
        put("base_model.model.norm.lora_A.weight", torch.ones(2, 3)),
        "PATH: layer 'norm': layer type: expected one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
        "ConvTranspose2d, ConvTranspose3d, found GroupNorm. tnpeft adapts no such layer and loads no part of a file: "
        "merge the adapter in the library that made it.",
    ),
    "channels": (
        put(f"{LINE}.lora_A.weight", torch.ones(2, 13)),
        f"PATH: layer 'line': axis 1 of the update that `{LINE}.lora_B.weight`, `{LINE}.lora_A.weight` make: expected "
        f"12, as Linear(12, 18) has it, found 13. {MADE_FOR}",
    ),
    "ranks that disagree": (
        put(f"{LINE}.lora_B.weight", torch.ones(18, 5)),
        f"PATH: layer 'line': tensor `{LINE}.lora_A.weight`: expected (5, 12), found (2, 12). {MADE_FOR}",
    ),
    "axes": (
        put(f"{LINE}.lora_A.weight", torch.ones(2)),
        f"PATH: layer 'line': tensor '{LINE}.lora_A.weight': expected 2 axes, found the shape (2,). {MADE_FOR}",
    ),
    "type": (
        put(f"{LINE}.lora_A.weight", torch.ones(2, 12, dtype=torch.int8)),
        f"PATH: tensor '{LINE}.lora_A.weight': expected floating-point numbers, found int8. Save the adapter "
        "unquantised.",
    ),
    "unknown": (
        put(f"{LINE}.lora_embedding_A", torch.ones(2)),
        f"PATH: tensor '{LINE}.lora_embedding_A' of 'line': expected `lora_A` and `lora_B`, as PEFT has them there, "
        f"found `lora_embedding_A`. {MADE_FOR}",
    ),
    "saved parameter of another shape": (
        put("base_model.model.norm.weight", torch.ones(3)),
        f"PATH: parameter 'norm.weight': expected (12,), found (3,). {MADE_FOR}",
    ),
    "two adapters": (
        put(f"{LINE}.lora_A.other.weight", torch.ones(2, 12)),
        f"PATH: layer 'line': `down`: expected one tensor, found '{LINE}.lora_A.other.weight' and "
        f"'{LINE}.lora_A.weight'. Save one adapter in a file.",
    ),
    "two methods": (
        put(f"{LINE}.hada_w1_a", torch.ones(2, 12)),
        f"PATH: layer 'line': tensors: expected those of lora alone, found also '{LINE}.hada_w1_a'. Save one adapter "
        "in a file.",
    ),
    "a bias that has no place": (
        put("base_model.model.conv2.lora_B.bias", torch.ones(7)),
        "PATH: bias of `lora_B` on layer 'conv2': expected a layer with a bias, found one without. "
        "Give the layer a bias, zero at first.",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, folder: Path):
    change, text = TENSORS[case]
    edit(folder / "adapter_model.safetensors", change)
    assert refused(folder) == text


def test_every_layer_that_does_not_fit_is_named(folder: Path):
    base = Net()
    base.line, base.conv2 = nn.Linear(11, 18), nn.Conv2d(20, 24, 3)
    problems = refused(folder, base=base).splitlines()
    assert [problem.split(": ")[1] for problem in problems] == ["layer 'line'", "layer 'conv2'"]


def test_grouped_convolutions_of_peft(folder: Path):
    base = Net()
    base.conv2 = nn.Conv2d(20, 24, (3, 2), groups=2)
    assert refused(folder, base=base) == (
        "PATH: layer 'conv2': LoRA: expected an ungrouped convolution, which PEFT's update is of in every case, found "
        "Conv2d(20, 24, 3x2, groups=2). Such an update is none of the grouped layer's weight: train it anew."
    )


KEY = "lycoris_line"
LYCORIS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no such layer": (
        rename(f"{KEY}.alpha", "lycoris_lime.alpha"),
        "PATH: tensor 'lycoris_lime.alpha': expected a layer of this model, its `.` written as `_`, found no such "
        f"layer. {MADE_FOR}",
    ),
    "method": (
        put(f"{KEY}.oft_blocks", torch.ones(2, 3, 3)),
        f"PATH: method: expected {METHODS}, found OFT or BOFT ('{KEY}.oft_blocks'). {ELSEWHERE}",
    ),
    "glora": (
        put(f"{KEY}.a1.weight", torch.ones(2, 3)),
        f"PATH: method: expected {METHODS}, found GLoRA ('{KEY}.a1.weight'). {ELSEWHERE}",
    ),
    "two methods": (
        put(f"{KEY}.hada_w1_a", torch.ones(18, 2)),
        f"PATH: layer 'line': tensors: expected those of one method, found hada and lora. {INCOMPLETE}",
    ),
    "alpha alone": (
        put("lycoris_conv1.alpha", torch.tensor(2.0)),
        f"PATH: layer 'conv1': tensors: expected those of one method, found `alpha` alone. {INCOMPLETE}",
    ),
    "alpha": (
        put(f"{KEY}.alpha", torch.tensor(float("inf"))),
        "PATH: layer 'line': `alpha`: expected one finite number, found [inf]. Mend or remove it.",
    ),
    "no up": (
        lambda tensors: tensors.pop(f"{KEY}.lora_up.weight"),
        f"PATH: layer 'line': tensors: expected `lora_up` beside '{KEY}.lora_down.weight', found no such tensor. "
        + INCOMPLETE,
    ),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris(case: str, file: Path):
    change, text = LYCORIS[case]
    edit(file, change)
    assert refused(file) == text


def test_layers_that_lycoris_writes_alike(tmp_path: Path):
    def base() -> nn.Module:
        net = nn.Module()
        net.a_b, net.a = nn.Linear(3, 3), nn.Module()
        net.a.b = nn.Linear(3, 3)
        return net

    save_file({"lycoris_a_b.lora_up.weight": torch.ones(3, 1)}, tmp_path / "a.safetensors")
    assert refused(tmp_path / "a.safetensors", base=base()) == (
        "PATH: tensor 'lycoris_a_b.lora_up.weight': expected one layer of this model, found 'a_b' and 'a.b', which are "
        "written alike. Rename one of the two in the model."
    )
    ours = base()
    tnpeft.attach(ours, "lora", match="b")
    assert cannot(ours, tmp_path / "b.safetensors", "lycoris") == (
        "PATH: layer 'a.b': LyCORIS's name 'lycoris_a_b': expected one layer, found that of layer 'a_b' too. "
        "Rename one in the model."
    )


def test_files_that_are_none(tmp_path: Path, folder: Path, file: Path):
    assert refused(tmp_path / "none") == (
        "PATH: adapter file: expected a file, or a folder of PEFT or diffusers, found no such file. Check the path."
    )
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == (
        "PATH: folder: expected `adapter_model.safetensors` or `pytorch_lora_weights.safetensors` in it, found no such "
        "file. Pass the folder that PEFT or diffusers saved to, or a file."
    )
    assert refused(file, format="onnx") == (
        "PATH: `format`: expected one of peft, diffusers, lycoris, kohya, comfyui, tenvoo, found 'onnx'. "
        "Leave `format` out to let the file's keys decide."
    )
    assert refused(file, alpha=2) == "PATH: `alpha`: expected none: the file holds it, found 2. Leave it out."
    ours = tmp_path / "ours.safetensors"
    tnpeft.save(adapted("lora", "line"), ours)
    assert refused(ours) == ("PATH: file: expected one of another library, found one of tnpeft. Use `tnpeft.load`.")
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    assert refused(folder) == (
        "PATH: PEFT adapter: expected `adapter_config.json` beside it, found no such file. "
        "Keep the two files that PEFT saves together: the scale of the update stands in the config."
    )
    (folder / "adapter_config.json").write_text("[1]")
    assert refused(folder) == (
        "PATH/adapter_config.json: PEFT config: expected a JSON object, found [1]. Copy or download the file again."
    )
    (folder / "adapter_config.json").write_text("{")
    assert refused(folder).startswith("PATH/adapter_config.json: PEFT config: expected a JSON file, found ")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, other)
    assert refused(other) == (
        f"PATH: file: expected an adapter: {METHODS}, found a model's own weights ('weight'). "
        "`tnpeft fit` makes an adapter of a fine-tuned checkpoint and its base."
    )
    save_file({"secret": torch.ones(2)}, other)
    assert refused(other) == f"PATH: method: expected {METHODS}, found 'secret'. {ELSEWHERE}"


def test_pickles_are_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "run",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    assert refused(tmp_path / "evil.pth") == (
        "PATH: adapter file: expected a state dict that `weights_only` can load, found a pickle with `getattr`, which "
        "would run code. Save the model's state dict alone; nothing else is loaded from a pickle."
    )
    torch.save({"a": Evil()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert refused(tmp_path / "old.pth") == (
        "PATH: adapter file: expected a zip, as torch writes since 1.6, found a bare pickle, which is not run. "
        "Write it anew: `torch.save(torch.load(open('old.pth', 'rb'), weights_only=True), 'old.pth')`."
    )
    assert not (tmp_path / "run").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    assert refused(tmp_path / "list.pth") == (
        "PATH: adapter file: expected a mapping of names to tensors, found a list. Save the model's state dict alone."
    )


def test_the_model_that_refuses(folder: Path):
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(AdapterFileError) as excinfo:
        tnpeft.load_foreign(empty, folder)
    assert str(excinfo.value) == (
        f"{folder}: base model: expected values, found none in layer 'line' (it is on the meta device). "
        "Give the model its weights before loading an adapter."
    )
    ours = loaded(folder)
    other = next(iter(tnpeft.load_foreign(ours, folder).adapters))  # again, in place
    tnpeft.detach(ours)
    tnpeft.attach(ours, "loha", match=[other])
    with pytest.raises(AttachError) as attach_error:
        tnpeft.load_foreign(ours, folder)
    assert all(" found " in str(problem) and str(folder) in str(problem) for problem in attach_error.value.problems)
    assert tnpeft.names_of(ours) == ("default",)
    assert tnpeft.load_foreign(ours, folder, name="second").name == "second"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_crash_or_change_the_model(data: st.DataObject, file: Path, folder: Path, tmp_path: Path):
    pickled = tmp_path / "adapter.pth"
    torch.save({f"line.{key}": torch.ones(4, 4) for key in ("lora_up.weight", "lora_down.weight")}, pickled)
    source = data.draw(st.sampled_from([file, folder / "adapter_model.safetensors", pickled]))
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 700)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    damaged = folder / "damaged"
    damaged.write_bytes(bytes(content))
    model = Net()
    before = bits(model)
    try:
        tnpeft.load_foreign(model, damaged)
    except tnpeft.TnpeftError:
        assert same_bits(bits(model), before)


def cannot(model: nn.Module, path: Path, format: str, name: str | None = None) -> str:  # noqa: A002 - its name
    """The text of the error of `save_foreign`, nothing written."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(AdapterFileError) as excinfo:
        tnpeft.save_foreign(model, path, format, name)
    assert sorted(path.parent.rglob("*")) == before
    return str(excinfo.value).replace(str(path), "PATH")


KEEP = "Merge it into the model instead, or keep it in tnpeft's own file."
COPY = """
tnpeft: 1
name: loha_copy
layers: any
params: {r: 2}
sizes: {o: out_channels, i: in_channels, s: r}
cores: {a: o r, b: r i, c: o s, d: s i}
weight: o i
start: frozen_copy
"""
CANNOT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "topology": (
        lambda: adapted("quanta", "line"),
        "lycoris",
        "PATH: layer 'line': spec 'quanta': expected the network of LoRA, LoCon, LoHa or LoKr, found "
        f"`abcd,efgb,hiea->hifgcd`. {KEEP}",
    ),
    "frozen copy": (
        lambda: adapted(tnpeft.Spec.from_yaml(COPY.replace("layers: any", "layers: [Linear]")), "line"),
        "peft",
        "PATH: layer 'line': spec 'loha_copy': expected an update without a frozen copy, found `start: frozen_copy`. "
        "Only LoRA's can be: it is a LoRA of twice the rank. Merge the adapter instead.",
    ),
    "kind in PEFT": (
        lambda: adapted("loha", "conv3"),
        "peft",
        "PATH: layer 'conv3': PEFT's LOHA: expected one of Linear, Conv1d, Conv2d, found Conv3d(24, 12, 1x3x2). "
        + KEEP,
    ),
    "groups in PEFT": (
        lambda: adapted("lora", "conv1", base=Net(groups=2)),
        "peft",
        "PATH: layer 'conv1': PEFT's LORA: expected an ungrouped convolution, found Conv1d(18, 20, 3, groups=2). "
        + KEEP,
    ),
    "dilation in PEFT": (
        lambda: adapted("lora", "conv1", base=Net(dilation=2)),
        "peft",
        "PATH: layer 'conv1': layer option: expected a layer without it, for the other library's forward drops it, "
        f"found `dilation=(2,)`. {KEEP}",
    ),
    "kind in LyCORIS": (
        lambda: adapted("lora", "0", base=nn.Sequential(nn.ConvTranspose1d(3, 4, 2))),
        "lycoris",
        "PATH: layer '0': LyCORIS: expected one of Linear, Conv1d, Conv2d, Conv3d, found ConvTranspose1d(3, 4, 2). "
        + KEEP,
    ),
    "norms": (
        lambda: adapted("lora", "line", train={"norm": True}),
        "lycoris",
        "PATH: parameters trained beside the cores: expected none: LyCORIS has no place for them, found 'norm.weight', "
        "'norm.bias'. Train the cores alone, or merge the adapter.",
    ),
    "biases in LyCORIS": (
        lambda: adapted("lora", "line", train={"bias": "adapted"}),
        "lycoris",
        "PATH: parameters trained beside the cores: expected none: LyCORIS has no place for them, found 'line.bias'. "
        "Train the cores alone, or merge the adapter.",
    ),
    "whole factor on Conv1d in PEFT": (
        lambda: adapted("krona", "conv1"),
        "peft",
        "PATH: PEFT's LOKR on Conv1d: expected a rank below half the larger side of the second factor, which PEFT "
        f"scrambles if it is whole, found a 5 x 6 factor of layer 'conv1'. {KEEP}",
    ),
    "factors that differ in PEFT": (
        lambda: adapted("lokr", "line|conv2", r=1, factor=8),
        "peft",
        "PATH: PEFT's LOKR: expected factors of the channels that one `decompose_factor` gives for all layers, found "
        "'line': 3 x 6 and 3 x 4; 'conv2': 3 x 8 and 4 x 5. Attach, and save, each as an adapter of its own.",
    ),
    "factors that LyCORIS does not find": (
        lambda: adapted("lokr", "conv2", r=1, factor=8),
        "lycoris",
        "PATH: layer 'conv2': LyCORIS's LoKr: expected factors whose sizes its loader finds again, found (3, 4) and "
        f"(8, 5, 3, 2). {KEEP}",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_written(case: str, tmp_path: Path):
    make, kind, text = CANNOT[case]
    assert cannot(make(), tmp_path / "a", kind) == text


def test_padding_is_dropped_by_both(tmp_path: Path):
    base = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"))
    for kind in ("peft", "lycoris"):
        assert cannot(adapted("lora", "0", base=base), tmp_path / "a", kind) == (
            "PATH: layer '0': layer option: expected a layer without it, for the other library's forward drops it, "
            f"found `padding_mode='circular'`. {KEEP}"
        )
        tnpeft.detach(base)


def test_methods_do_not_mix_in_peft(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "tnpeft: 1\nname: two\nadapters:\n  - {spec: lora, match: line}\n  - {spec: loha, match: conv2}\n"
    )
    model = Net()
    tnpeft.attach(model, recipe)
    assert cannot(model, tmp_path / "a", "peft") == (
        "PATH: methods: expected one of LoRA, LoHa and LoKr for all layers, found LORA on 'line', LOHA on 'conv2'. "
        "Attach, and save, each as an adapter of its own."
    )
    move(model)
    tnpeft.save_foreign(model.eval(), tmp_path / "a.safetensors", "lycoris")
    assert torch.allclose(loaded(tmp_path / "a.safetensors")(X), model(X), atol=1e-5)


def test_running_statistics_that_changed(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tnpeft.attach(model, "lora", match="0")
    tnpeft.save_foreign(model, tmp_path / "a.safetensors", "lycoris")
    model.train()(torch.randn(5, 3))
    assert cannot(model, tmp_path / "b.safetensors", "lycoris") == (
        "PATH: running statistics: expected those of the base model, found others in '1.running_mean'. "
        "Train with the norms in evaluation mode, or keep the adapter in tnpeft's own file."
    )


def test_models_formats_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted("lora", "line")
    path = tmp_path / "a"
    assert (
        cannot(model, path, "onnx")
        == "PATH: `format`: expected one of peft, diffusers, lycoris, kohya, comfyui, found "
        "'onnx'. Pass one of these."
    )
    assert cannot(model, path, "peft", "b") == (
        "PATH: adapter name: expected one of 'default', found 'b'. Pass one of these names."
    )
    assert cannot(Net(), path, "peft") == (
        "model: expected an attached adapter, found none. "
        "Attach one with `tnpeft.attach`, or pass the whole model that it was attached to."
    )
    assert cannot(model, tmp_path, "lycoris") == (
        "PATH: adapter file: expected a file name, found a folder. Add a name, for example `adapter.safetensors`."
    )
    assert cannot(model, tmp_path / "no" / "where", "peft") == (
        "PATH: adapter folder: expected to be made, found No such file or directory. "
        "Choose a folder that exists, can be written to and has room."
    )
    (tmp_path / "file").write_text("")
    assert cannot(model, tmp_path / "file", "peft") == (
        "PATH: adapter folder: expected a new or an existing folder, found a file. Choose another path."
    )
    for ending in (".safetensors", ".pt"):
        assert cannot(model, path.with_suffix(ending), "peft") == (
            f"PATH: adapter folder: expected the name of a folder, found that of a {ending} file. "
            f"Pass a folder's name, for example '{path}'; PEFT reads two files in it."
        )
    assert cannot(model, path.with_suffix(".bin"), "diffusers") == (
        "PATH: adapter: expected the name of a folder or a .safetensors file, found that of a .bin file. "
        f"Pass a folder's name, for example '{path}', or '{path}.safetensors'."
    )
    tnpeft.merge(model)
    assert cannot(model, path, "peft") == (
        "PATH: model: expected an unmerged model, found a merged one. Call `tnpeft.unmerge(model)` first."
    )


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    import tnpeft.io.files as files

    monkeypatch.setattr(files.os, "fsync", full)
    for path in (folder, tmp_path / "new"):
        assert cannot(adapted("loha", "line"), path, "peft") == (
            "PATH/adapter_model.safetensors: adapter file: expected to be written, found No space left on device. "
            "Choose a folder that exists, can be written to and has room."
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    tnpeft.save_foreign(adapted("loha", "line"), folder, "peft")
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LOHA"


def test_safetensors_whose_header_looks_like_a_pickle(file: Path):
    """The first bytes are the header's length: 128 more or less, and it is 0x80 or `P`."""
    for first in (0x80, 0x50):
        data = safetensors.torch.save(load_file(file), {"padding": ""})
        size = struct.unpack("<Q", data[:8])[0]
        header = data[8 : 8 + size].rstrip(b" ")
        wanted = next(length for length in range(len(header), len(header) + 257) if length % 256 == first)
        file.write_bytes(struct.pack("<Q", wanted) + header.ljust(wanted) + data[8 + size :])
        loaded(file)
