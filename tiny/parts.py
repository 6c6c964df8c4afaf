"""What the embedded base is made of, for pretrain.py: the parts' configs in diffusers' layout, the
tokenizers made from the words of the world, and the weights before training.
"""

import json

import numpy as np
import torch
from torch import Tensor

import scenes
from frozen.text import CLIPText, Text, Tokenizer, byte_symbols, split_words
from model import MMDiT

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "sample_size": 64,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "force_upcast": True,
}

TOKENS = 24  # longest caption of the world has 23 words
MMDIT_CONFIG = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "joint_attention_dim": 256,
    "caption_projection_dim": 192,
    "pooled_projection_dim": 256,
    "pos_embed_max_size": 16,
    "dual_attention_layers": [],
    "qk_norm": "rms_norm",
}
CLIP_CONFIG = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 2.0,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


# ---- the tokenizers ------------------------------------------------------------------------------
def count_words():
    """How often each word occurs in captions and wishes of the world."""
    rng, words = np.random.default_rng(0), {}
    for i in range(4000):
        scene = scenes.sample_scene(np.random.default_rng((7, i)))
        texts = scenes.caption(scene, rng), scenes.wish(scene, rng)
        for text in (*texts, "change remove add the trees undo it"):
            for word in split_words(text):
                words[word] = words.get(word, 0) + 1
    return words


def learn_merges(words):
    """Byte-pair merges until every word is one symbol. -> [(left, right), ...]"""
    parts = {w: [*w[:-1], w[-1] + "</w>"] for w in words}  # the world's words are plain ASCII
    merges = []
    while True:
        pairs = {}
        for w, p in parts.items():
            for pair in zip(p, p[1:]):
                pairs[pair] = pairs.get(pair, 0) + words[w]
        if not pairs:
            return merges
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for p in parts.values():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = ["".join(best)]
                i += 1


def make_tokenizers(folder):
    """Byte-pair merges learnt from the world's own words, written in CLIP's format: one token per
    word of the world. -> vocabulary"""
    merges = learn_merges(count_words())
    symbols = list(byte_symbols().values())
    vocab = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = json.dumps({v: i for i, v in enumerate(vocab)}, ensure_ascii=False)
    lines = "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n"
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "vocab.json").write_text(ids, "utf-8")
        (path / "merges.txt").write_text(lines, "utf-8")
        special = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": pad,
        }
        text = json.dumps(special, indent=2)
        (path / "special_tokens_map.json").write_text(text)
        kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}
        text = json.dumps(kind | {"do_lower_case": True} | special, indent=2)
        (path / "tokenizer_config.json").write_text(text)
    return vocab


# ---- the weights ---------------------------------------------------------------------------------
def sincos(d: int, size: int, base: float = 1e4) -> Tensor:
    """The 2-D sin-cos position table for a square grid; a base brings its own.
    -> (1, size*size, d)"""
    omega = base ** (-torch.arange(d // 4) / (d // 4))
    angle = torch.arange(size)[:, None] * omega  # (size, d/4)
    line = torch.cat([angle.sin(), angle.cos()], -1)  # (size, d/2)
    across = line[None].expand(size, -1, -1)
    down = line[:, None].expand(-1, size, -1)
    table = torch.cat([across, down], -1)  # (size, size, d)
    return table.flatten(0, 1)[None]


def build(folder):
    """folder: where the tokenizers go. -> model, text, the text encoders' configs"""
    vocab = make_tokenizers(folder)
    end = len(vocab) - 1
    words = {"vocab_size": len(vocab), "bos_token_id": end - 1, "eos_token_id": end}
    configs = []
    for act, pad in (("quick_gelu", end), ("gelu", 0)):
        configs.append(CLIP_CONFIG | words | {"hidden_act": act, "pad_token_id": pad})
    tokenizers = [Tokenizer(folder / n) for n in ("tokenizer", "tokenizer_2")]
    text = Text(tokenizers, [CLIPText(c) for c in configs])
    model = MMDiT(MMDIT_CONFIG)
    table = sincos(model.width, model.grid, base=100.0)  # 8 x 8 tokens: no need for base 1e4
    model.pos_embed.pos_embed.copy_(table)
    for name, p in list(model.named_parameters()) + list(text.named_parameters()):
        if "embedding.weight" in name:
            torch.nn.init.normal_(p, std=0.5 if "token" in name else 0.1)
        elif p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif "norm" not in name:
            torch.nn.init.zeros_(p)
    for name, p in model.named_parameters():  # adaLN-zero: every block begins as identity
        if name.startswith(("norm_out", "proj_out")) or ".norm1" in name:
            torch.nn.init.zeros_(p)
    return model, text, configs
