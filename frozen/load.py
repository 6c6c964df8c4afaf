"""Finds a base, downloads it where needed, and reads it.

A base is a folder in diffusers' layout of the SD3 family: model_index.json and a folder per part.
"""

import pathlib
import re

import torch

from files.disk import ROOT, UserError, open_tensors, read_json, why
from frozen.text import CLIPText, Text, Tokenizer
from frozen.vae import VAE
from model import WIDE, MMDiT
from routing import time_grid

NAMED = {  # bases one can ask for by a short name
    "tiny": str(ROOT / "tiny" / "checkpoint"),
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "bokeh": "tensorart/bokeh_3.5_medium",
}

# the parts that have weights, and the other files of a base; T5 (text_encoder_3) is never needed
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
SMALL_FILES = ["model_index.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*"]

# diffusers' mark of a file saved in another precision
VARIANT = re.compile(r"\.(fp16|bf16|fp32)\b")

# attention in older VAE files
NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAMES = re.compile(rf"(attentions\.\d+\.)({'|'.join(NEW_NAMES)})(?=\.)")


def find_base(base: str) -> pathlib.Path:
    """A short name, a folder or a Hub id -> local folder. Downloads only what is needed, never T5.

    Raises UserError where there is no such base, or it cannot be downloaded.
    """
    name = NAMED.get(base, base)
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(
            f"unknown base '{base}': use one of {', '.join(NAMED)}, a folder, "
            "or a Hub id like owner/name",
            2,
        )
    from huggingface_hub import errors  # slow to import, and needed only here

    try:
        return download(name)
    except errors.GatedRepoError:  # a kind of RepositoryNotFoundError, so first
        raise UserError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, "
            "then `hf auth login` or set HF_TOKEN; "
            "or take the ungated --base bokeh, or a local folder"
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"the Hub has no repository {name}, or it is private: "
            "check the name, or `hf auth login`"
        )
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not in the local cache and the Hub cannot be reached: "
            "go online once, give --base a local folder in diffusers layout, "
            "or take --base tiny, which needs no network"
        )
    except Exception as error:  # a cut line, a full disk: the library has a class for each
        raise UserError(f"cannot download {name} ({why(error)}); run again to go on")


def download(name):
    """A Hub id -> the folder in the local cache. Raises what huggingface_hub raises."""
    import huggingface_hub as hub

    try:
        files, online = hub.HfApi().list_repo_files(name), True
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
        raise
    except Exception:  # no network, or told to stay offline: what the cache holds must do
        files, online = [], False
    patterns = [*SMALL_FILES, *weights_among(files)]
    folder = hub.snapshot_download(name, local_files_only=not online, allow_patterns=patterns)
    return pathlib.Path(folder)


def weights_among(files):
    """The configs and weights of PARTS among a repository's files, e.g. "vae/config.json".

    A variant is taken only where a part has nothing else.
    """
    chosen = []
    for part in PARTS:
        inside = [f for f in files if re.fullmatch(part + r"/[^/]*\.(json|safetensors)", f)]
        if any(re.fullmatch(part + r"/[^/.]*\.safetensors", f) for f in inside):
            inside = [f for f in inside if not VARIANT.search(f)]
        chosen += inside
    return chosen


def load_base(
    base: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[MMDiT, VAE, Text, float]:
    """dtype: of the weights, None is float32.
    -> model (MMDiT), vae (VAE, always float32), text (Text), shift of the scheduler's time grid

    Raises UserError where there is no such base, or its folder is damaged or of another family.
    """
    dtype = dtype or torch.float32
    folder = find_base(base)
    check_family(folder)
    model = load_part(MMDiT, folder / "transformer", device, dtype)
    vae = load_part(VAE, folder / "vae", device, torch.float32)
    tokenizers = [load_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = []
    for name in ("text_encoder", "text_encoder_2"):
        encoders.append(load_part(CLIPText, folder / name, device, dtype))
    text = Text(tokenizers, encoders)
    try:
        check_vocabularies(text)
        shift = float(read_json(folder / "scheduler" / "scheduler_config.json").get("shift", 1.0))
        try_all_parts(model, vae, text, torch.device(device), dtype)
        if not 0 < shift < 1000 or model.sample_size > model.grid * model.patch:
            raise ValueError(f"shift {shift}, sample_size {model.sample_size}")
    except (ValueError, TypeError, RuntimeError, LookupError) as error:
        raise UserError(f"{folder}: its parts do not fit together ({why(error)})")
    return model, vae, text, shift


def check_family(folder):
    """Raises UserError unless folder holds a pipeline of the SD3 family."""
    if not (folder / "model_index.json").exists():
        raise UserError(
            f"{folder} has no model_index.json; "
            "a base is a folder in diffusers layout of the SD3 family"
        )
    kind = read_json(folder / "model_index.json").get("_class_name")
    if "StableDiffusion3" not in str(kind):
        raise UserError(f"{folder} holds a {kind}; only the SD3 family can be a base here")


def load_tokenizer(folder):
    """Raises UserError where folder holds no CLIP tokenizer."""
    try:
        return Tokenizer(folder)
    except Exception as error:  # whatever a damaged file makes of it
        raise UserError(
            f"{folder} holds no CLIP tokenizer: "
            f"vocab.json, merges.txt or tokenizer.json ({why(error)})"
        )


def check_vocabularies(text):
    """Raises ValueError where a tokenizer's ids exceed its encoder's table."""
    for tokenizer, encoder in zip(text.tokenizers, text.encoders):
        words = encoder.embeddings["token_embedding"].num_embeddings
        if max(tokenizer.vocab.values()) >= words:
            raise ValueError("a tokenizer has more words than its encoder")


@torch.no_grad()
def try_all_parts(model, vae, text, device, dtype):
    """Once through everything, with the smallest picture. Raises what a misfit raises."""
    side = model.patch * vae.factor
    pixels = torch.zeros(1, 3, side, side, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        x = vae.encode(pixels)  # (1, C, patch, patch)
        velocity = model(x, torch.ones(1, device=device), text(["a"]))
        decoded = vae.decode(velocity.float())
    if decoded.shape != pixels.shape:
        raise ValueError("what goes in has another size than what comes out")


def load_part(cls, folder, device, dtype):
    """A part of the base (cls: MMDiT, VAE or CLIPText), frozen, on device and in dtype.

    It is built without memory for its weights, which are then read one by one. Raises UserError
    where a file is missing or damaged, and on the first tensor that config.json does not describe.
    """
    part = build_part(cls, folder)
    state, tensors = part.state_dict(), {}
    for path in weight_files(folder):
        tensors.update(read_weights(path, state, device, dtype))
    missing = [name for name in state if name not in tensors]
    if missing:
        raise UserError(
            f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} of {len(state)} are)"
        )
    part.load_state_dict(tensors, assign=True)
    return part.requires_grad_(False).eval()


def build_part(cls, folder):
    """cls(folder/config.json) on the meta device, that is without weights. Raises UserError."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(
            f"{folder} has no config.json; a base is a folder in diffusers layout of the SD3 family"
        )
    config = read_json(file)
    try:
        for key, value in config.items():
            # a damaged number of layers would take minutes to build
            if "layers" in key and isinstance(value, int) and value > 1000:
                raise ValueError("more than 1000 layers")
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # whatever a damaged config makes of it
        raise UserError(f"{file}: describes no {cls.__name__} ({why(error)})")


def read_weights(path, state, device, dtype):
    """One file's tensors, by their names in state. Raises UserError on the first that misfits."""
    tensors = {}
    with open_tensors(path, device) as file:
        for key in file.keys():
            name = name_in_part(key)
            if name.endswith("position_ids"):  # a counter, which old CLIP files saved
                continue
            if name not in state:
                raise UserError(
                    f"{path}: unexpected tensor '{key}'; "
                    f"the file is of another model than {path.parent / 'config.json'} describes"
                )
            shape, described = file.get_slice(key).get_shape(), list(state[name].shape)
            if list(shape) != described:
                raise UserError(
                    f"{path}: tensor '{key}' is {shape}, but config.json asks for {described}"
                )
            tensors[name] = file.get_tensor(key).to(dtype)
    return tensors


def name_in_part(key):
    """A tensor's key in a file -> its name in our module: old VAE attention, CLIP's prefix."""
    name = OLD_NAMES.sub(lambda match: match[1] + NEW_NAMES[match[2]], key)
    return name.removeprefix("text_model.")


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files that hold one part: a single file, or the shards that an index lists.

    Full precision goes before a variant (*.fp16.safetensors).
    Raises UserError where there are none, or where a download left some out.
    """
    weights = folder.glob("*.safetensors")
    single = [file for file in weights if not re.search(r"-\d+-of-\d+", file.name)]
    indices = folder.glob("*.safetensors.index*.json")

    def rank(file):
        return bool(VARIANT.search(file.name)), len(file.name)

    found = sorted([*single, *indices], key=rank)
    if not found:
        raise UserError(
            f"{folder} has no *.safetensors weights (and no index of shards); "
            "copy or download them in diffusers layout"
        )
    if found[0].suffix == ".json":
        return shards(found[0])
    return found[:1]


def shards(index):
    """The files that an index of shards lists. Raises UserError where one is missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_file_name, weight_map.values())):
        raise UserError(f"{index}: has no usable weight_map; download this file again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.exists():
            raise UserError(
                f"{file} is missing though {index.name} lists it: "
                "the download is incomplete, run it again"
            )
    return files


def is_file_name(name):
    """Whether name is a string without a folder: an index must not lead out of its own."""
    return isinstance(name, str) and pathlib.PurePath(name).name == name


# ---- what suits the base -------------------------------------------------------------------------
def working_size(h: int, w: int, model: MMDiT, vae: VAE, limit: float) -> tuple[int, int]:
    """The size an h x w picture is edited at: its aspect, about limit x limit pixels, whole patches
    of the base."""
    unit = model.patch * vae.factor
    scale = limit / (h * w) ** 0.5
    size = []
    for side in (h, w):
        whole = max(unit, round(side * scale / unit) * unit)
        size.append(min(whole, model.grid * unit))
    return tuple(size)


def edit_size(picture, model: MMDiT, vae: VAE, size: tuple | None = None) -> tuple[int, int]:
    """The size a picture (h, w, 3) is edited at, in whole patches: of its own aspect and the area
    of `size`, or its own size, where that is no larger than the base's own pictures."""
    h, w = picture.shape[:2]
    if size:
        return working_size(h, w, model, vae, (size[0] * size[1]) ** 0.5)
    return working_size(h, w, model, vae, min((h * w) ** 0.5, vae.factor * model.sample_size))


def shift_at(latents: torch.Tensor, shift: float, model: MMDiT) -> float:
    """The shift of the time grid for latents (..., h, w): the base's own is for pictures of its own
    size, and grows with the side (arXiv 2403.03206, Eq. 23), from 1 on."""
    h, w = latents.shape[-2:]
    return max(1.0, shift * (h * w) ** 0.5 / model.sample_size)


def edit_grid(x: torch.Tensor, model: MMDiT, shift: float, own=None, steps=None) -> torch.Tensor:
    """The time grid for latents x of a rollout or an edit; shift: the base's; own: --shift; steps:
    None for those of an edit."""
    return time_grid(steps or edit_steps(model), own or shift_at(x, shift, model))


def edit_steps(model: MMDiT) -> int:
    """The Euler steps of an edit: the paper's 20; on the embedded base 8, as many as the rollouts
    in training have, which are as good there."""
    return 20 if model.width > WIDE else 8
