"""Whatever diffusers and transformers write, we read; what cannot be a base is refused in one
sentence."""

import gzip
import importlib.util
import json
import pathlib
import random
import shutil
import types
import warnings

import huggingface_hub as hub
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from files.disk import UserError, write_tensors
from files.run import key_in_file, load_adapter
from frozen.load import find_base, load_base, load_part
from frozen.text import CLIPText, Tokenizer, byte_symbols
from frozen.vae import VAE
from model import MMDiT, new_adapter

CHECKPOINT = ROOT / "tiny" / "checkpoint"
SMALL = {
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}


# ---- files that load ---------------------------------------------------------------------------
def same(part, theirs):
    ours = part.state_dict()
    theirs = theirs.state_dict().items()
    return all(torch.equal(ours[name.removeprefix("text_model.")], v) for name, v in theirs)


def test_sharded_and_variant_files_load(tmp_path):
    theirs = SD3Transformer2DModel(**SMALL)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    assert same(load_part(MMDiT, tmp_path / "shards", "cpu", torch.float32), theirs)
    theirs.half().save_pretrained(tmp_path / "fp16", variant="fp16")
    theirs.save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="50KB")
    for name in ("fp16", "both"):
        part = load_part(MMDiT, tmp_path / name, "cpu", torch.float32)
        assert same(part, theirs.float()) and part.proj_out.weight.dtype == torch.float32
    exact = SD3Transformer2DModel(**SMALL)
    exact.save_pretrained(tmp_path / "both")  # the full precision is there, too, and wins
    assert same(load_part(MMDiT, tmp_path / "both", "cpu", torch.float32), exact)


def test_old_vae_attention_names_load(tmp_path):
    theirs = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old = {}
    for key, v in load_file(file).items():
        for new, name in names.items():
            key = key.replace(new, name)
        old[key] = v
    assert any("proj_attn" in key for key in old)
    save_file(old, file)
    assert same(load_part(VAE, tmp_path, "cpu", torch.float32), theirs)


# ---- keys and shapes, on no memory -------------------------------------------------------------
def shapes(module):
    state = module.state_dict().items()
    known = {k.removeprefix("text_model."): v.shape for k, v in state}
    return {k: shape for k, shape in known.items() if "position_ids" not in k}


def sd3(layers, positions, **more):
    """A config of the family, whose width is 64 for each layer."""
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "num_layers": layers,
        "num_attention_heads": layers,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * layers,
        "pos_embed_max_size": positions,
    } | more


FULL = {
    "sd3-medium": sd3(24, 192),
    "sd3.5-medium": sd3(24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "sd3.5-large": sd3(38, 192, qk_norm="rms_norm"),
}
TEXTS = {
    "CLIP-L": {"hidden_size": 768, "num_hidden_layers": 12, "hidden_act": "quick_gelu"},
    "CLIP-G": {"hidden_size": 1280, "num_hidden_layers": 32, "hidden_act": "gelu"},
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_transformers_have_diffusers_keys_and_shapes(name):
    with torch.device("meta"):
        assert shapes(MMDiT(FULL[name])) == shapes(SD3Transformer2DModel(**FULL[name]))


@pytest.mark.parametrize("name", TEXTS)
def test_full_size_text_encoders_have_transformers_keys_and_shapes(name):
    d = TEXTS[name]["hidden_size"]
    sizes = {"intermediate_size": 4 * d, "projection_dim": d, "num_attention_heads": d // 64}
    config = TEXTS[name] | sizes
    with torch.device("meta"):
        theirs = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        assert shapes(CLIPText(config)) == shapes(theirs)


def test_the_full_size_vae_has_diffusers_keys_and_shapes():
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    with torch.device("meta"):
        assert shapes(VAE(config)) == shapes(AutoencoderKL(**config))


def test_absent_keys_of_a_config_take_the_libraries_defaults():
    with torch.device("meta"):
        assert shapes(MMDiT({})) == shapes(SD3Transformer2DModel())
        assert shapes(VAE({})) == shapes(AutoencoderKL())
        text = CLIPTextModelWithProjection(CLIPTextConfig())
        assert shapes(CLIPText({})) == shapes(text)


# ---- the tokenizer -----------------------------------------------------------------------------
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ",
    "ABC def's 'll I'm don't 're 0123456789",
    "äöüßéèñçøå ÀÉÎÕÜ ",
    "東京日本語漢字かなカナ",
    "🌲🏠❄️👨‍👩‍👧🇩🇪 ",
    "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~ ",
    "\t\n\u00a0\u200b\u2009\u3000 a",
    "е́ж привет мир",
    "e\u0301a\u0308n\u0303 o",
    "अआइ ไทย عربى",
    "½²³ⅣⅨ٣४",
]
WORDS = (
    "make it winter house with three pine trees, a red <|endoftext|> <|startoftext|> snow!!! it's "
    "you'll 1984 co-op"
).split(" ")
ODD = [
    *("", " ", "!", "!!!", "a" * 400, "a " * 60, "word " * 300),
    *("<|endoftext|>", "x<|endoftext|>y", "make it winter", "A RED house, in fog!"),
    *("it's the dog's 1234", "naïve café über 東京 🌲🌲", "tab\tand\nnewline  here"),
    *("x²+y½ don't can't we're", "__init__ foo_bar", "\u200b e\u0301 ǅ"),
]


def strings(n=2000):
    """The odd ones, then random mixtures of alphabets."""
    rng = random.Random(0)
    out = list(ODD)
    while len(out) < n:
        pool = "".join(rng.sample(ALPHABETS, rng.randint(1, 3)))
        text = "".join(rng.choice(pool) for _ in range(rng.choice((3, 12, 40, 200))))
        if rng.random() < 0.5:
            text += " " + " ".join(rng.sample(WORDS, 4))
        out.append(text)
    return out


def clip_vocabulary(folder, pad):
    """CLIP's own 49,408 words as SD3's tokenizer folders hold them, from the merges that open_clip
    carries."""
    package = pathlib.Path(importlib.util.find_spec("open_clip").origin).parent
    packed = (package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = list(byte_symbols().values())
    words = symbols + [symbol + "</w>" for symbol in symbols]
    words += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("vocabulary", ["embedded", "CLIP"])
@pytest.mark.parametrize("name, pad", [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")])
def test_tokenizer_gives_transformers_ids_on_2000_strings_from_either_format(
    vocabulary, name, pad, tmp_path
):
    folder = CHECKPOINT / name
    if vocabulary == "CLIP":
        folder = clip_vocabulary(tmp_path / "clip", pad)
    theirs, saved = CLIPTokenizer.from_pretrained(folder), tmp_path / "saved"
    theirs.save_pretrained(saved)  # transformers 5 writes tokenizer.json alone
    assert (saved / "tokenizer.json").exists() and not (saved / "merges.txt").exists()
    texts, ours = strings(), Tokenizer(folder)
    whole = {"padding": "max_length", "max_length": ours.length, "truncation": True}
    want = theirs(texts, return_tensors="pt", **whole).input_ids
    if vocabulary == "CLIP":
        assert want.max() == 49407
        assert ours(["a red house"])[0, :5].tolist() == [49406, 320, 736, 1212, 49407]
    for tokenizer in (ours, Tokenizer(saved)):
        apart = (tokenizer(texts) != want).any(1).nonzero().flatten().tolist()
        assert not apart, (len(apart), texts[apart[0]])


# ---- our adapter in diffusers ------------------------------------------------------------------
def test_diffusers_loads_our_adapter_and_merges_it_to_our_weights(tmp_path):
    """Without a warning, nothing left out and nothing unexpected; and load_adapter reads it back.
    A run's folder holds a checkpoint, too."""
    model, file = load_base(str(CHECKPOINT))[0], tmp_path / "adapter.safetensors"
    adapter = {name: 0.02 * torch.randn_like(v) for name, v in new_adapter(model, 4).items()}
    tensors = {key_in_file(name): v for name, v in adapter.items()}
    write_tensors(file, tensors, rank=4, format="pt")
    write_tensors(tmp_path / "checkpoint.safetensors", {"now.x": torch.zeros(1)})
    again = load_adapter(file, model)
    assert again.keys() == adapter.keys()
    assert all(torch.equal(again[name], v) for name, v in adapter.items())

    no_t5 = dict.fromkeys(["text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"])
    pipe = StableDiffusion3Pipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32, **no_t5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.load_lora_weights(tmp_path, adapter_name="byg")
    loaded = {key.replace(".byg", "") for key in pipe.transformer.state_dict() if "lora_" in key}
    assert loaded == adapter.keys() - {"source_proj.weight"}
    pipe.fuse_lora()
    merged = pipe.transformer.state_dict()
    for name, module in model.named_modules():
        down = adapter.get(name + ".lora_A.weight")
        if down is not None:
            want = module.weight + adapter[name + ".lora_B.weight"] @ down
            fused = merged[name + ".base_layer.weight"]
            torch.testing.assert_close(fused, want, rtol=1e-5, atol=1e-6)


# ---- what is refused ---------------------------------------------------------------------------
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def change_tensors(change):
    """-> a damage: `change` of the transformer's tensors"""

    def damage(base):
        tensors = load_file(base / WEIGHTS)
        change(tensors)
        save_file(tensors, base / WEIGHTS)

    return damage


def write(name, text):
    """-> a damage: another text in a file of the base"""
    return lambda base: (base / name).write_text(text)


def remove(name):
    def damage(base):
        path = base / name
        path.unlink() if path.is_file() else shutil.rmtree(path)

    return damage


def cut(base):
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:5000])


def index(*files):
    """-> a damage: an index of shards, of which only the first is there"""

    def damage(base):
        (base / WEIGHTS).rename(base / "transformer/x-00001-of-00002.safetensors")
        weight_map = {str(i): file for i, file in enumerate(files)}
        (base / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


SHARDS = "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"
SDXL = '{"_class_name": "StableDiffusionXLPipeline"}'
DAMAGE = {  # name: damage, what the sentence says
    "truncated": (cut, (WEIGHTS, "cannot be read")),
    "missing key": (
        change_tensors(lambda t: t.pop("proj_out.bias")),
        ("transformer", "'proj_out.bias' is missing"),
    ),
    "wrong shape": (
        change_tensors(lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        (WEIGHTS, "'proj_out.bias'", "[3]"),
    ),
    "alien key": (
        change_tensors(lambda t: t.update({"down_blocks.0.x": torch.zeros(3)})),
        (WEIGHTS, "'down_blocks.0.x'"),
    ),
    "damaged json": (write("vae/config.json", "{"), ("vae/config.json", "JSON")),
    "nonsense config": (
        write("transformer/config.json", '{"num_layers": "many"}'),
        ("transformer/config.json", "MMDiT"),
    ),
    "no weights": (remove(WEIGHTS), ("transformer", "no *.safetensors")),
    "missing shard": (index(*SHARDS), ("x-00002-of-00002", "incomplete")),
    "path outside": (index("../../secret.safetensors"), ("weight_map",)),
    "no tokenizer": (remove("tokenizer"), ("tokenizer",)),
    "damaged tokenizer": (write("tokenizer/vocab.json", "[]"), ("tokenizer",)),
    "no scheduler": (remove("scheduler"), ("scheduler_config.json",)),
    "SDXL": (write("model_index.json", SDXL), ("StableDiffusionXLPipeline", "SD3")),
    "UNet": (remove("model_index.json"), ("model_index.json", "SD3")),
}


def one_sentence(error, words):
    said = str(error.value)
    assert all(word in said for word in words) and "\n" not in said, said


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_alien_folder_is_refused_with_file_and_key(name, tmp_path):
    damage, words = DAMAGE[name]
    damage(shutil.copytree(CHECKPOINT, tmp_path / "base"))
    with pytest.raises(UserError) as error:
        load_base(str(tmp_path / "base"))
    one_sentence(error, words)


@pytest.mark.parametrize(
    "where, kind, words",
    [
        (
            "snapshot_download",
            hub.errors.GatedRepoError,
            ("gated", "its terms at https://huggingface.co/some/repo", "hf auth login", "bokeh"),
        ),
        (
            "list_repo_files",
            hub.errors.RepositoryNotFoundError,
            ("no repository some/repo", "private"),
        ),
        ("snapshot_download", hub.errors.LocalEntryNotFoundError, ("local cache", "--base tiny")),
        ("snapshot_download", OSError, ("cannot download", "run again")),
    ],
)
def test_a_hub_that_refuses_gives_one_clear_sentence(monkeypatch, where, kind, words):
    def refuse(*_, **__):
        if issubclass(kind, hub.errors.HfHubHTTPError):  # these want the response
            raise kind("refused", response=types.SimpleNamespace(headers={}, request=None))
        raise kind("refused")

    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_: ["transformer/config.json"])
    monkeypatch.setattr(hub.HfApi if where == "list_repo_files" else hub, where, refuse)
    with pytest.raises(UserError) as error:
        find_base("some/repo")
    one_sentence(error, words)


NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "vae/config.json",
    "text_encoder_2/model.safetensors",
}
NOT_NEEDED = {
    "sd3.5_medium.safetensors",
    "tokenizer_3/spiece.model",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_2/model.fp16.safetensors",
}
MODEL = "transformer/diffusion_pytorch_model"
VARIANT = {f"{MODEL}.fp16.safetensors"}
SHARDED = {f"{MODEL}-00001-of-00002.safetensors", f"{MODEL}.safetensors.index.json"}


@pytest.mark.parametrize("there, wanted", [(VARIANT | SHARDED, SHARDED), (VARIANT, VARIANT)])
def test_only_the_needed_files_are_downloaded(monkeypatch, tmp_path, there, wanted):
    """A variant only where there is nothing else; never T5, never a checkpoint in one file."""
    files, asked = sorted(NEEDED | NOT_NEEDED | there), {}

    def download(name, **options):
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_: files)
    monkeypatch.setattr(hub, "snapshot_download", download)
    find_base("some/repo")
    got = hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"])
    assert set(got) == NEEDED | wanted
