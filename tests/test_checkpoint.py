"""diffusers is the outside witness: it loads tiny/checkpoint and draws the same picture from the
same noise."""

import os

import numpy as np
import torch
from conftest import ROOT
from diffusers import StableDiffusion3Pipeline

from frozen.load import load_base
from frozen.vae import to_images
from model import new_adapter
from routing import time_grid
from sample import edit, generate

CHECKPOINT = os.environ.get("BASE", str(ROOT / "tiny" / "checkpoint"))
NO_T5 = dict.fromkeys(["text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"])


@torch.no_grad()
def test_diffusers_draws_the_same_picture():
    prompt, n = "a red house by three pine trees in winter at night", 4
    eps = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe = StableDiffusion3Pipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32, **NO_T5)
    pipe.set_progress_bar_config(disable=True)
    sigmas = time_grid(n)[:-1].tolist()  # its scheduler shifts them
    how = {"guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "np"}
    theirs = pipe(prompt, latents=eps, sigmas=sigmas, **how).images[0]
    model, vae, text, shift = load_base(CHECKPOINT)
    x = generate(model, text([prompt]), text([""]), eps, time_grid(n, shift), 3.0)
    ours = to_images(vae.decode(x))[0]
    assert ours.std() > 5
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.01


@torch.no_grad()
def test_a_half_precision_base_edits_and_draws_as_in_float32():
    """What sample.py does on CUDA: bf16 weights under autocast; latents, noise and adapter stay in
    float32."""
    ts, eps = time_grid(2), torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _, text, _ = load_base(CHECKPOINT, dtype=dtype)
        torch.manual_seed(0)
        adapter = {k: v + 0.02 * torch.randn_like(v) for k, v in new_adapter(model, 4).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            edited = edit(model, adapter, eps.flip(2), text(["make it winter"]), eps, ts)
            drawn = generate(model, text(["a red house"]), text([""]), eps, ts, 3.0)
        results.append((edited, drawn))
    for full, half in zip(*results):
        assert half.dtype == torch.float32
        assert (half - full).square().mean() < 0.01 * full.square().mean()
