"""QLoRA's round: trained on 4 or 8 bits as transformers loads them, used on the whole weights, and the reverse."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

TOKENS = torch.arange(16).reshape(2, 8)
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True},
}
LAYERS = r"\.(q_proj|down_proj|c_attn|c_proj)$"


def saved(kind: str, folder: Path) -> type[LlamaForCausalLM | GPT2LMHeadModel]:
    torch.manual_seed(0)
    if kind == "gpt2":  # its Conv1D become linear layers where they are quantised
        config = GPT2Config(
            vocab_size=32, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
        return GPT2LMHeadModel
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("spec", ["lora", "dora"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_files_go_both_ways(kind: str, bits: int, spec: str, back: bool, tmp_path: Path):
    known = saved(kind, tmp_path / "base")

    def load(**options: object) -> nn.Module:
        return known.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, **options).eval()

    # Which casts norms and embeddings to fp32, as PEFT's users do.
    models = [prepare_model_for_kbit_training(load(quantization_config=BitsAndBytesConfig(**BITS[bits]))), load()]
    first, second = models[::-1] if back else models
    handle = tnpeft.attach(first, spec, match=LAYERS, r=2, train={"norm": True})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    handle.save(tmp_path / "a.safetensors")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", tnpeft.TnpeftWarning)
        other = tnpeft.load(second, tmp_path / "a.safetensors")
    told = [each for each in told if each.category is tnpeft.TnpeftWarning]
    assert len(told) == (spec == "dora")  # which is made of the weight, and that is another
    assert all("expected the values that the adapter was trained on" in str(each.message) for each in told)
    if spec == "lora":
        for layer, adapter in handle.adapters.items():
            delta = other.adapters[layer].delta_weight()
            assert torch.equal(adapter.delta_weight(), delta.T if kind == "gpt2" else delta)
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=0.2 * float(logits(first).abs().max()))
