"""Real classes of other people's libraries at sizes for tests, with random weights, and a batch of inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["ZOO", "Specimen", "specimen"]


class Specimen(NamedTuple):
    """A model, and what it computes of a fixed batch."""

    model: nn.Module
    run: Callable[[nn.Module], Tensor]


def _tokens() -> Tensor:
    return torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))


def _volumes(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=_tokens()).logits


def llama() -> Specimen:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return Specimen(LlamaForCausalLM(config), _logits)


def gpt2() -> Specimen:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return Specimen(GPT2LMHeadModel(config), _logits)


def bert() -> Specimen:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return Specimen(BertForSequenceClassification(config), _logits)


def vit() -> Specimen:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return Specimen(ViTForImageClassification(config), lambda model: model(_volumes(2, 3, 8, 8)).logits)


def mixtral() -> Specimen:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return Specimen(MixtralForCausalLM(config), _logits)


def unet() -> Specimen:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return Specimen(model, lambda model: model(_volumes(2, 4, 8, 8), 3, _volumes(2, 5, 12)).sample)


def flux() -> Specimen:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip

    def run(model: nn.Module) -> Tensor:
        return model(
            hidden_states=_volumes(2, 16, 4), encoder_hidden_states=_volumes(2, 5, 12),
            pooled_projections=_volumes(2, 6), timestep=torch.tensor([0.5, 0.7]), img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip

    return Specimen(model, run)


def dit() -> Specimen:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip

    def run(model: nn.Module) -> Tensor:
        labels = torch.tensor([1, 2])
        return model(_volumes(2, 4, 8, 8), timestep=torch.tensor([3, 4]), class_labels=labels).sample

    return Specimen(model, run)


def _timm(name: str, **options: Any) -> nn.Module:
    from timm_alone import timm

    return timm.create_model(name, pretrained=False, num_classes=3, **options)


def timm_vit() -> Specimen:
    model = _timm("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    return Specimen(model, lambda model: model(_volumes(2, 3, 8, 8)))


def efficientnet() -> Specimen:
    return Specimen(_timm("efficientnet_b0"), lambda model: model(_volumes(2, 3, 33, 33)))


def convnext() -> Specimen:
    model = _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 16))
    return Specimen(model, lambda model: model(_volumes(2, 3, 32, 32)))


def swin_unetr() -> Specimen:
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    return Specimen(model, lambda model: model(_volumes(1, 1, 64, 32, 32)))


def dynunet() -> Specimen:
    from monai.networks.nets import DynUNet

    model = DynUNet(3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 8, 16), deep_supervision=False)
    return Specimen(model, lambda model: model(_volumes(2, 1, 8, 8, 8)))


def segresnet() -> Specimen:
    from monai.networks.nets import SegResNet

    model = SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,))
    return Specimen(model, lambda model: model(_volumes(2, 1, 8, 8, 8)))


def autoencoder() -> Specimen:
    from monai.networks.nets import AutoencoderKL

    model = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, num_res_blocks=(1, 1), channels=(8, 16), latent_channels=2,
        attention_levels=(False, True), norm_num_groups=4,
    )  # fmt: skip
    return Specimen(model, lambda model: model.decode(model.encode(_volumes(1, 1, 8, 8, 8))[0]))


def ddpm() -> Specimen:
    from monai.networks.nets import DiffusionModelUNet

    model = DiffusionModelUNet(
        spatial_dims=3, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 16), norm_num_groups=4,
        attention_levels=(False, True), num_head_channels=(0, 8),
    )  # fmt: skip
    return Specimen(model, lambda model: model(_volumes(2, 1, 8, 8, 8), torch.tensor([3, 4])))


def _nnunet(kind: str, **options: Any) -> nn.Module:
    from dynamic_network_architectures.architectures import unet

    return getattr(unet, kind)(
        input_channels=1, n_stages=3, features_per_stage=(4, 8, 16), conv_op=nn.Conv3d, kernel_sizes=3,
        strides=(1, 2, 2), num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **options,
    )  # fmt: skip


def plain_conv_unet() -> Specimen:
    model = _nnunet("PlainConvUNet", n_conv_per_stage=2)
    return Specimen(model, lambda model: model(_volumes(2, 1, 8, 8, 8)))


def residual_encoder_unet() -> Specimen:
    model = _nnunet("ResidualEncoderUNet", n_blocks_per_stage=1)
    return Specimen(model, lambda model: model(_volumes(2, 1, 8, 8, 8)))


ZOO: dict[str, Callable[[], Specimen]] = {
    make.__name__: make
    for make in (
        llama, gpt2, bert, vit, mixtral, unet, flux, dit, timm_vit, efficientnet, convnext, swin_unetr, dynunet,
        segresnet, autoencoder, ddpm, plain_conv_unet, residual_encoder_unet,
    )
}  # fmt: skip


def specimen(name: str, seed: int = 0) -> Specimen:
    """One of them, the same weights each time, and none of them zero: layers that start so hide what is before them."""
    torch.manual_seed(seed)
    found = ZOO[name]()
    with torch.no_grad():
        for parameter in found.model.parameters():
            if parameter.is_floating_point():
                scale = 0.05 if parameter.ndim < 2 else 0.5 / max(parameter[0].numel(), 1) ** 0.5
                parameter.add_(scale * torch.randn(parameter.shape))
    return Specimen(found.model.eval(), found.run)
