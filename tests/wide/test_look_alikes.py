"""Layers and weights as transformers and torchao make them; tests/network has those of other libraries."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import GPT2Config, GPT2LMHeadModel

import tnpeft


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_weights_that_torchao_has_quantised(config):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantize_(model[0], config())
    x = torch.randn(2, 64)
    first = model(x)
    report = tnpeft.attach(model, "lora", match="all").report()
    assert torch.equal(model(x), first)
    assert {row.name: row.layer for row in report.layers} == {"0": "Linear(64, 64, opaque)", "2": "Linear(64, 64)"}
    assert report.skipped == {}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8)).eval()


TOKENS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("mode", ["auto", "dense"])
def test_gpt2s_layers_are_linear_ones(mode, tmp_path):
    model = gpt2()
    expected = model(TOKENS).logits
    handle = tnpeft.attach(model, "lora", match=r"c_attn$", mode=mode)
    assert torch.equal(model(TOKENS).logits, expected)
    assert [row.layer for row in handle.report().layers] == ["Linear(8, 24, turned)"] * 2
    with torch.no_grad():
        for name, core in model.named_parameters():
            if name.endswith("core_up"):
                core.fill_(0.3)
    tuned = model(TOKENS).logits
    assert not torch.allclose(tuned, expected, atol=1e-3)
    tnpeft.save(model, tmp_path / "a.safetensors")
    fresh = gpt2()
    tnpeft.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(TOKENS).logits, tuned)
    tnpeft.detach(model, merge=True)
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path / "whole")(TOKENS).logits, tuned)


def test_peft_reads_adapters_of_gpt2(tmp_path):
    """PEFT's own `Conv1D` layers, `fan_in_fan_out`: its LoRA matrices are those of a Linear."""
    model = gpt2()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in an old way
        theirs = peft.get_peft_model(gpt2(), config).eval()
        theirs.save_pretrained(tmp_path / "theirs")
    tnpeft.load_foreign(model, tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits)


def test_all_of_a_model_with_such_layers():
    report = tnpeft.attach(gpt2(), "lora", match="all").report()
    assert len(report.layers) == 9  # lm_head too: its weight is the embedding's, which stays
    assert report.skipped == {}
