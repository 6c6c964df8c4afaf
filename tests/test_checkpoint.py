"""diffusers is the outside witness: it loads tiny/checkpoint and draws the same picture from the same noise."""

import os
import pathlib

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from frozen.load import load_base  # noqa: E402
from frozen.vae import to_images
from model import new_adapter
from routing import time_grid
from sample import edit, generate

CHECKPOINT = os.environ.get(
    "BASE", str(pathlib.Path(__file__).resolve().parent.parent / "tiny" / "checkpoint")
)


@torch.no_grad()
def test_diffusers_draws_the_same_picture():
    prompt, n = "a red house by three pine trees in winter at night", 4
    model, vae, text, shift = load_base(CHECKPOINT)
    eps = torch.randn(1, model.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = to_images(
        vae.decode(generate(model, text([prompt]), text([""]), eps, time_grid(n, shift), 3.0))
    )[0]
    pipe = StableDiffusion3Pipeline.from_pretrained(
        CHECKPOINT,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
        torch_dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt,
        latents=eps,
        sigmas=time_grid(n)[:-1].tolist(),
        guidance_scale=3.0,
        height=64,
        width=64,
        output_type="np",
    ).images[0]
    assert ours.std() > 5
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.01


@torch.no_grad()
def test_a_half_precision_base_edits_and_draws_as_in_float32():
    """What sample.py does on CUDA: bf16 weights under autocast, float32 latents, noise and adapter."""
    ts, eps = time_grid(2), torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _, text, _ = load_base(CHECKPOINT, dtype=dtype)
        torch.manual_seed(0)
        adapter = {k: v + 0.02 * torch.randn_like(v) for k, v in new_adapter(model, 4).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results.append(
                (
                    edit(model, adapter, eps.flip(2), text(["make it winter"]), eps, ts),
                    generate(model, text(["a red house"]), text([""]), eps, ts, 3.0),
                )
            )
    for full, half in zip(*results):
        assert (
            half.dtype == torch.float32
            and (half - full).square().mean() < 0.01 * full.square().mean()
        )
