"""Experts of transformers' mixtures, whose weights are one tensor: a Mixtral and a gpt-oss, beside PEFT."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import tnpeft

TOKENS = torch.arange(14).reshape(2, 7) * 5 % 64
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
EXPERTS = r"experts\.(gate_up|down)_proj$"


def mixtral(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **more)).eval()


def gpt_oss(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, **more)).eval()


def train(handle: tnpeft.Handle) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("make", "axes"), [(mixtral, "e o i"), (gpt_oss, "e i o")])
@pytest.mark.parametrize("spec", ["lora", "loha", "tt_lora"])
def test_experts_are_the_sum(make: Any, axes: str, way: str, spec: str) -> None:
    adapted, base = make(experts_implementation=way), make(experts_implementation=way)
    start = adapted(TOKENS).logits
    handle = tnpeft.attach(adapted, spec, match=r"embed_tokens|[qv]_proj$", parameters={EXPERTS: axes})
    torch.testing.assert_close(adapted(TOKENS).logits, start, rtol=0, atol=1e-6)
    train(handle)
    state = base.state_dict()
    for name, adapter in handle.adapters.items():
        key = name if name in state else f"{name}.weight"
        state[key] = state[key] + adapter.delta_weight().detach()
    wanted = torch.func.functional_call(base, state, (TOKENS,)).logits
    torch.testing.assert_close(adapted(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    grads = [parameter.grad.clone() for parameter in handle.parameters()]
    adapted.zero_grad()
    adapted.train()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted(TOKENS, labels=TOKENS).loss.backward()
    for parameter, grad in zip(handle.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5)
    adapted.eval()
    tnpeft.merge(adapted)
    torch.testing.assert_close(adapted(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_values_and_counts_are_those_of_peft() -> None:
    base = mixtral()
    ours = copy.deepcopy(base)
    handle = tnpeft.attach(ours, "lora", match="embed_tokens", parameters={EXPERTS: "e o i"}, r=2, alpha=6)
    train(handle)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens"], target_parameters=names)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    assert handle.report().trained == sum(each.numel() for each in theirs.parameters() if each.requires_grad)
    state = dict(theirs.named_parameters())
    with torch.no_grad():
        for number in range(2):
            place = f"base_model.model.model.layers.{number}.mlp.experts"
            for key, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
                adapter = handle.adapters[f"model.layers.{number}.mlp.experts.{key}"]
                down, up = adapter.cores["down"], adapter.cores["up"]  # (e, r, i), (e, o, r)
                state[f"{place}{inner}.lora_A.default.weight"].copy_(down.reshape(-1, down.shape[-1]))
                # PEFT's up matrix is (o, r * e), experts the quicker of the two.
                state[f"{place}{inner}.lora_B.default.weight"].copy_(up.permute(1, 2, 0).reshape(up.shape[1], -1))
        table = handle.adapters["model.embed_tokens"].cores
        layer = theirs.base_model.model.model.embed_tokens
        layer.lora_embedding_A["default"].copy_(table["down"])
        layer.lora_embedding_B["default"].copy_(table["up"])
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
