"""Whatever diffusers and transformers write, we read; what cannot be a base is refused in one sentence."""

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
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from files.disk import UserError, write_tensors  # noqa: E402
from files.run import key_in_file, load_adapter  # noqa: E402
from frozen.load import find_base, load_base, load_part  # noqa: E402
from frozen.text import CLIPText, Tokenizer, byte_symbols
from frozen.vae import VAE
from model import MMDiT, new_adapter

CHECKPOINT = pathlib.Path(__file__).resolve().parent.parent / "tiny" / "checkpoint"
SMALL = dict(
    sample_size=16,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    in_channels=4,
    out_channels=4,
    joint_attention_dim=48,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
    qk_norm="rms_norm",
    dual_attention_layers=(0,),
)


def same(part, theirs):
    ours = part.state_dict()
    return all(
        torch.equal(ours[k.removeprefix("text_model.")], v) for k, v in theirs.state_dict().items()
    )


def test_sharded_and_variant_files_load(tmp_path):
    theirs = SD3Transformer2DModel(**SMALL)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    assert same(load_part(MMDiT, tmp_path / "shards", "cpu", torch.float32), theirs)
    half = theirs.half()
    half.save_pretrained(tmp_path / "fp16", variant="fp16")
    half.save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="50KB")
    for name in ("fp16", "both"):
        part = load_part(MMDiT, tmp_path / name, "cpu", torch.float32)
        assert same(part, half.float()) and part.proj_out.weight.dtype == torch.float32
        half.half()
    exact = SD3Transformer2DModel(**SMALL)
    exact.save_pretrained(tmp_path / "both")  # the full precision is there too, and wins
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
    old = {}
    for k, v in load_file(file).items():
        for new, name in (
            ("to_q.", "query."),
            ("to_k.", "key."),
            ("to_v.", "value."),
            ("to_out.0.", "proj_attn."),
        ):
            k = k.replace(new, name)
        old[k] = v
    assert any("proj_attn" in k for k in old)
    save_file(old, file)
    assert same(load_part(VAE, tmp_path, "cpu", torch.float32), theirs)


FULL = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
)


@pytest.mark.parametrize(
    "config",
    [
        FULL
        | dict(
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        ),
        FULL
        | dict(
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        ),
        FULL
        | dict(
            num_layers=38,
            num_attention_heads=38,
            attention_head_dim=64,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    ],
    ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
def test_full_size_keys_and_shapes_equal_diffusers(config):
    with torch.device("meta"):
        ours, theirs = MMDiT(config), SD3Transformer2DModel(**config)
    shapes = lambda m: {k: v.shape for k, v in m.state_dict().items()}  # noqa: E731
    assert shapes(ours) == shapes(theirs)


def test_full_size_text_encoders_and_vae_keys_and_shapes():
    shapes = lambda m: {
        k.removeprefix("text_model."): v.shape
        for k, v in m.state_dict().items()
        if "position_ids" not in k
    }  # noqa: E731
    large = dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    for config in (
        dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
        ),
        large,
    ):
        with torch.device("meta"):
            assert shapes(CLIPText(config)) == shapes(
                CLIPTextModelWithProjection(CLIPTextConfig(**config))
            )
    config = dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    with torch.device("meta"):
        assert shapes(VAE(config)) == shapes(AutoencoderKL(**config))


def test_absent_keys_of_a_config_take_the_libraries_defaults():
    shapes = lambda m: {
        k.removeprefix("text_model."): v.shape
        for k, v in m.state_dict().items()
        if "position_ids" not in k
    }  # noqa: E731
    with torch.device("meta"):
        for ours, theirs in (
            (MMDiT, SD3Transformer2DModel()),
            (VAE, AutoencoderKL()),
            (CLIPText, CLIPTextModelWithProjection(CLIPTextConfig())),
        ):
            assert shapes(ours({})) == shapes(theirs), ours.__name__


def strings(n=2000):
    rng = random.Random(0)
    alphabets = [
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
    words = "make it winter house with three pine trees, a red <|endoftext|> <|startoftext|> snow!!! it's you'll 1984 co-op".split(
        " "
    )
    out = [
        "",
        " ",
        "!",
        "!!!",
        "a" * 400,
        "a " * 60,
        "word " * 300,
        "<|endoftext|>",
        "x<|endoftext|>y",
        "make it winter",
        "A RED house, in fog!",
        "it's the dog's 1234",
        "naïve café über 東京 🌲🌲",
        "tab\tand\nnewline  here",
        "x²+y½ don't can't we're",
        "__init__ foo_bar",
        "\u200b e\u0301 ǅ",
    ]
    while len(out) < n:
        pool = "".join(rng.sample(alphabets, rng.randint(1, 3)))
        text = "".join(rng.choice(pool) for _ in range(rng.choice((3, 12, 40, 200))))
        out.append(text + (" " + " ".join(rng.sample(words, 4)) if rng.random() < 0.5 else ""))
    return out


def clip_vocabulary(folder, pad):
    """CLIP's own 49,408 words as SD3's tokenizer folders hold them, from the merges that open_clip carries."""
    packed = (
        pathlib.Path(importlib.util.find_spec("open_clip").origin).parent
        / "bpe_simple_vocab_16e6.txt.gz"
    )
    merges = (
        gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    )
    symbols = [*byte_symbols().values()]
    words = (
        symbols
        + [s + "</w>" for s in symbols]
        + ["".join(m.split()) for m in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": pad,
            }
        )
    )
    return folder


@pytest.mark.parametrize("vocabulary", ["embedded", "CLIP"])
@pytest.mark.parametrize("name, pad", [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")])
def test_tokenizer_gives_transformers_ids_on_2000_strings_from_either_format(
    vocabulary, name, pad, tmp_path
):
    folder = (
        CHECKPOINT / name if vocabulary == "embedded" else clip_vocabulary(tmp_path / "clip", pad)
    )
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")  # transformers 5 writes tokenizer.json alone
    assert (tmp_path / "saved/tokenizer.json").exists() and not (
        tmp_path / "saved/merges.txt"
    ).exists()
    texts, ours = strings(), Tokenizer(folder)
    want = theirs(
        texts, padding="max_length", max_length=ours.length, truncation=True, return_tensors="pt"
    ).input_ids
    assert vocabulary == "embedded" or (
        want.max() == 49407
        and ours(["a red house"])[0, :5].tolist() == [49406, 320, 736, 1212, 49407]
    )
    for tokenizer in (ours, Tokenizer(tmp_path / "saved")):
        wrong = [
            (t, a, b) for t, a, b in zip(texts, tokenizer(texts).tolist(), want.tolist()) if a != b
        ]
        assert not wrong, (len(wrong), wrong[0])


def test_diffusers_loads_our_adapter_and_merges_it_to_our_weights(tmp_path):
    model = load_base(str(CHECKPOINT))[0]
    adapter = {k: torch.randn_like(v) * 0.02 for k, v in new_adapter(model, 4).items()}
    write_tensors(
        tmp_path / "adapter.safetensors",
        {key_in_file(k): v for k, v in adapter.items()},
        rank=4,
        format="pt",
    )
    write_tensors(
        tmp_path / "checkpoint.safetensors", {"now.x": torch.zeros(1)}
    )  # a run's folder holds this, too
    again, meta = load_adapter(tmp_path / "adapter.safetensors", model)
    assert (
        meta["rank"] == "4"
        and again.keys() == adapter.keys()
        and all(torch.equal(again[k], v) for k, v in adapter.items())
    )
    pipe = StableDiffusion3Pipeline.from_pretrained(
        CHECKPOINT,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
        torch_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.load_lora_weights(tmp_path, adapter_name="byg")
    loaded = {
        k.replace(".byg", ""): v for k, v in pipe.transformer.state_dict().items() if "lora_" in k
    }
    assert loaded.keys() == adapter.keys() - {
        "source_proj.weight",
        "source_gate.weight",
    }  # nothing left out, nothing unexpected
    pipe.fuse_lora()
    merged = pipe.transformer.state_dict()
    for name, module in model.named_modules():
        if (down := adapter.get(name + ".lora_A.weight")) is not None:
            want = module.weight + adapter[name + ".lora_B.weight"] @ down
            torch.testing.assert_close(
                merged[name + ".base_layer.weight"], want, rtol=1e-5, atol=1e-6
            )


@pytest.fixture
def base(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "base")
    return tmp_path / "base"


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DAMAGE = {
    "truncated": (
        lambda b: (b / WEIGHTS).write_bytes((b / WEIGHTS).read_bytes()[:5000]),
        ("diffusion_pytorch_model.safetensors", "cannot be read"),
    ),
    "missing key": (
        lambda b: edit_tensors(b / WEIGHTS, lambda t: t.pop("proj_out.bias")),
        ("transformer", "'proj_out.bias' is missing"),
    ),
    "wrong shape": (
        lambda b: edit_tensors(b / WEIGHTS, lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        (WEIGHTS, "'proj_out.bias'", "[3]"),
    ),
    "alien key": (
        lambda b: edit_tensors(
            b / WEIGHTS, lambda t: t.update({"down_blocks.0.x": torch.zeros(3)})
        ),
        (WEIGHTS, "'down_blocks.0.x'"),
    ),
    "damaged json": (
        lambda b: (b / "vae/config.json").write_text("{"),
        ("vae/config.json", "JSON"),
    ),
    "nonsense config": (
        lambda b: (b / "transformer/config.json").write_text('{"num_layers": "many"}'),
        ("transformer/config.json", "MMDiT"),
    ),
    "no weights": (lambda b: (b / WEIGHTS).unlink(), ("transformer", "no *.safetensors")),
    "missing shard": (
        lambda b: (
            (b / WEIGHTS).rename(b / "transformer/x-00001-of-00002.safetensors")
            and (b / (WEIGHTS + ".index.json")).write_text(
                json.dumps(
                    {
                        "weight_map": {
                            "a": "x-00001-of-00002.safetensors",
                            "b": "x-00002-of-00002.safetensors",
                        }
                    }
                )
            )
        ),
        ("x-00002-of-00002", "incomplete"),
    ),
    "path outside": (
        lambda b: (
            (b / WEIGHTS).unlink()
            or (b / (WEIGHTS + ".index.json")).write_text(
                json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
            )
        ),
        ("weight_map",),
    ),
    "no tokenizer": (lambda b: shutil.rmtree(b / "tokenizer"), ("tokenizer",)),
    "damaged tokenizer": (lambda b: (b / "tokenizer/vocab.json").write_text("[]"), ("tokenizer",)),
    "no scheduler": (lambda b: shutil.rmtree(b / "scheduler"), ("scheduler_config.json",)),
    "SDXL": (
        lambda b: (b / "model_index.json").write_text(
            '{"_class_name": "StableDiffusionXLPipeline"}'
        ),
        ("StableDiffusionXLPipeline", "SD3"),
    ),
    "UNet": (lambda b: (b / "model_index.json").unlink(), ("model_index.json", "SD3")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_alien_folder_is_refused_with_file_and_key(name, base):
    damage, words = DAMAGE[name]
    damage(base)
    with pytest.raises(UserError) as error:
        load_base(str(base))
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), error.value


def refuse(kind):
    """An error as the library raises it: those that come from a response want one."""

    def fail(*_, **__):
        if issubclass(kind, hub.errors.HfHubHTTPError):
            raise kind("refused", response=types.SimpleNamespace(headers={}, request=None))
        raise kind("refused")

    return fail


@pytest.mark.parametrize(
    "where, kind, words",
    [
        (
            "snapshot_download",
            hub.errors.GatedRepoError,
            (
                "gated",
                "accept its terms at https://huggingface.co/some/repo",
                "hf auth login",
                "bokeh",
            ),
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
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_: ["transformer/config.json"])
    monkeypatch.setattr(hub.HfApi if where == "list_repo_files" else hub, where, refuse(kind))
    with pytest.raises(UserError) as error:
        find_base("some/repo")
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("plain", [True, False])
def test_only_the_needed_files_are_downloaded(monkeypatch, tmp_path, plain):
    model = "transformer/diffusion_pytorch_model"
    files = [
        "sd3.5_medium.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer_3/spiece.model",
        "text_encoder_3/model-00001-of-00002.safetensors",
        f"{model}.fp16.safetensors",
        "vae/config.json",
        "text_encoder_2/model.safetensors",
        "text_encoder_2/model.fp16.safetensors",
    ] + plain * [f"{model}-00001-of-00002.safetensors", f"{model}.safetensors.index.json"]
    asked = {}
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_: files)
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path)
    )
    find_base("some/repo")
    got = set(hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    want = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "vae/config.json",
        "text_encoder_2/model.safetensors",
    }
    assert got == want | (set(files[-2:]) if plain else {f"{model}.fp16.safetensors"})
