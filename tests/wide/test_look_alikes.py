"""Layers and weights as transformers and torchao make them; tests/network has those of other libraries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tnpeft

KINDS = "Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d"


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
@pytest.mark.parametrize("match", ["0", "all"])
def test_weights_that_torchao_has_quantised(config, match):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantize_(model[0], config())
    kind = type(model[0].weight).__name__
    found = f"{kind}, quantised by torchao"
    if match == "all":
        report = tnpeft.attach(model, "lora", match="all").report()
        assert [row.name for row in report.layers] == ["2"]
        assert report.skipped == {"0": found}
        return
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora", match="0")
    assert str(caught.value) == (
        f"layer '0': weight: expected a plain tensor, found {found}. Attach to the unquantised model."
    )


def turn(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The model with the blocks' layers of a kind, Conv1D or Linear, as layers of the other, their weights turned."""
    for name, module in [*model.transformer.h.named_modules()]:
        if isinstance(module, kind):
            rows, columns = module.weight.shape
            other = nn.Linear(rows, columns) if kind is Conv1D else Conv1D(rows, columns)
            other.weight, other.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            model.transformer.h.set_submodule(name, other)
    return model


def test_gpt2s_layers_are_no_convolutions(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8)).eval()
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora", match=r"c_attn$")
    assert str(caught.value) == (
        f"layers 'transformer.h.0.attn.c_attn', 'transformer.h.1.attn.c_attn': layer type: expected one of {KINDS}, "
        "found transformers' Conv1D, a linear layer with a transposed weight. Put an `nn.Linear` with its bias and "
        "`nn.Parameter(weight.T.contiguous())` in its place, then attach; save such a model with `tnpeft.save`, or "
        "turn the weights back first: what `save_pretrained` writes of it loads as another model, or not at all."
    )
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens).logits
    plain = copy.deepcopy(model)
    turn(model, Conv1D)  # the advice, followed
    report = tnpeft.attach(model, "lora", match=r"c_attn$").report()
    assert len(report.layers) == 2
    torch.testing.assert_close(model(tokens).logits, expected)
    with torch.no_grad():
        for name, core in model.named_parameters():
            if name.endswith("core_up"):
                core.fill_(0.3)
    tuned = model(tokens).logits
    assert not torch.allclose(tuned, expected, atol=1e-3)
    tnpeft.save(model, tmp_path / "a.safetensors")
    fresh = turn(copy.deepcopy(plain), Conv1D)
    tnpeft.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(tokens).logits, tuned)
    tnpeft.detach(model, merge=True)
    turn(model, nn.Linear).save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path / "whole")(tokens).logits, tuned)
    turn(model, Conv1D).save_pretrained(tmp_path / "turned")
    with pytest.raises(RuntimeError, match="mismatch"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "turned")


def test_all_of_a_model_with_such_layers():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    report = tnpeft.attach(model, "lora", match="all").report()
    assert [row.name for row in report.layers] == ["lm_head"]  # its weight is the embedding's, which stays
    assert set(report.skipped.values()) == {"transformers' Conv1D, a linear layer with a transposed weight"}
