"""The same weights give the same numbers as diffusers and transformers (fp32, random weights)."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import model
from frozen.load import load_part
from frozen.text import CLIPText
from frozen.vae import VAE
from model import MMDiT


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def saved_and_loaded(theirs, ours, folder):
    """Random weights for their module, which goes through a file. -> theirs, ours"""
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    theirs.eval().save_pretrained(folder)
    return theirs, load_part(ours, folder, "cpu", torch.float32)


@pytest.mark.parametrize(
    "qk_norm, dual, heads",
    [(None, [], 1), ("rms_norm", [0, 1], 2), ("rms_norm", [], 3)],
    ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
@torch.no_grad()
def test_transformer_equals_diffusers(tmp_path, monkeypatch, qk_norm, dual, heads):
    """diffusers gets T5's 256 zeros in full; ours one token, as on the CPU and on accelerators."""
    theirs = SD3Transformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=heads,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=48,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
    )
    theirs, ours = saved_and_loaded(theirs, MMDiT, tmp_path)
    x, t = torch.randn(2, 4, 16, 12), torch.tensor([0.3, 1.0])
    text, pooled = torch.randn(2, 9, 40), torch.randn(2, 20)
    padded = torch.nn.functional.pad(text, (0, 8, 0, 256))
    expected = theirs(x, padded, pooled, t * 1000).sample
    close(ours(x, t, (text, pooled)), expected)
    monkeypatch.setattr(model, "with_weight", model.with_copies)
    close(ours(x, t, (text, pooled)), expected)


@pytest.mark.parametrize(
    "quant, size",
    [(True, (40, 24)), (False, (40, 24)), (False, (41, 27))],
    ids=["quant", "plain", "odd size"],
)
@torch.no_grad()
def test_vae_equals_diffusers(tmp_path, quant, size):
    theirs = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=5,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        scaling_factor=1.5,
        shift_factor=0.06,
    )
    theirs, ours = saved_and_loaded(theirs, VAE, tmp_path)
    pixels = torch.rand(2, 3, *size) * 2 - 1
    x = (theirs.encode(pixels).latent_dist.mean - 0.06) * 1.5
    close(ours.encode(pixels), x)
    close(ours.decode(x), theirs.decode(x / 1.5 + 0.06).sample)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_clip_equals_transformers(tmp_path, act):
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=24,
        max_position_embeddings=16,
        hidden_act=act,
        bos_token_id=97,
        eos_token_id=98,
        pad_token_id=98,
    )
    theirs, ours = saved_and_loaded(CLIPTextModelWithProjection(config), CLIPText, tmp_path)
    ids = torch.tensor([[97, *range(3, 9), 98, *[98] * 8], [97, 4, 98, *[0] * 13]])
    want = theirs(ids, output_hidden_states=True)
    before, pooled = ours(ids)
    close(before, want.hidden_states[-2])
    close(pooled, want.text_embeds)
