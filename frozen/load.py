"""Finds a base, downloads it where needed, and reads it: a folder in diffusers' layout of the SD3 family."""

import pathlib
import re
import sys

import torch

from files.disk import ROOT, UserError, open_tensors, read_json, why
from frozen.text import CLIPText, Text, Tokenizer
from frozen.vae import VAE
from model import MMDiT

NAMED = {  # bases one can ask for by a short name
    "tiny": str(ROOT / "tiny" / "checkpoint"),
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "bokeh": "tensorart/bokeh_3.5_medium",
}


VARIANT = re.compile(
    r"\.(fp16|bf16|fp32)\b"
)  # diffusers' mark of a file saved in another precision


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files that hold one part: a single file, or the shards that an index lists; full precision before a
    variant (*.fp16.safetensors). Raises UserError where there are none, or where a download left some out."""
    single = [f for f in folder.glob("*.safetensors") if not re.search(r"-\d+-of-\d+", f.name)]
    found = sorted(
        [*single, *folder.glob("*.safetensors.index*.json")],
        key=lambda f: (bool(VARIANT.search(f.name)), len(f.name)),
    )
    if not found:
        raise UserError(
            f"{folder} has no *.safetensors weights (and no index of shards); copy or download them in diffusers layout"
        )
    if found[0].suffix != ".json":
        return found[:1]
    shards = read_json(found[0]).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(s, str) and pathlib.PurePath(s).name == s for s in shards.values()
    ):
        raise UserError(f"{found[0]}: has no usable weight_map; download this file again")
    files = [folder / s for s in sorted(set(shards.values()))]
    for file in files:
        if not file.exists():
            raise UserError(
                f"{file} is missing though {found[0].name} lists it: the download is incomplete, run it again"
            )
    return files


NEW_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # attention in older VAE files


OLD_NAMES = re.compile(rf"(attentions\.\d+\.)({'|'.join(NEW_NAMES)})(?=\.)")


def load_part(cls, folder, device, dtype):
    """Builds cls from folder/config.json without memory for its weights, then reads them one by one, straight to device and dtype."""
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} has no config.json; a base is a folder in diffusers layout of the SD3 family"
        )
    config = read_json(folder / "config.json")
    try:
        if any("layers" in k and isinstance(v, int) and v > 1000 for k, v in config.items()):
            raise ValueError("more than 1000 layers")  # they would take minutes to build
        with torch.device("meta"):
            part = cls(config)
    except Exception as error:  # whatever a damaged config makes of it
        raise UserError(f"{folder / 'config.json'}: describes no {cls.__name__} ({why(error)})")
    want, tensors = part.state_dict(), {}
    for path in weight_files(folder):
        with open_tensors(path, device) as file:
            for key in file.keys():
                name = OLD_NAMES.sub(lambda m: m[1] + NEW_NAMES[m[2]], key).removeprefix(
                    "text_model."
                )
                if name.endswith("position_ids"):  # a counter, which old CLIP files saved
                    continue
                if name not in want:
                    raise UserError(
                        f"{path}: unexpected tensor '{key}'; the file is of another model than {folder / 'config.json'} describes"
                    )
                if tuple(shape := file.get_slice(key).get_shape()) != want[name].shape:
                    raise UserError(
                        f"{path}: tensor '{key}' is {shape}, but config.json asks for {list(want[name].shape)}"
                    )
                tensors[name] = file.get_tensor(key).to(dtype)
    if missing := [k for k in want if k not in tensors]:
        raise UserError(
            f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} of {len(want)} are)"
        )
    part.load_state_dict(tensors, assign=True)
    return part.requires_grad_(False).eval()


def choose_base(base: str) -> str:
    """'auto' -> the base for this machine, said in one line; any other name stays what it is."""
    if base == "auto":
        base = "sd3.5-medium" if torch.cuda.is_available() else "tiny"
        print(
            f"base: {base} (chosen for this machine; --base {' | '.join(NAMED)} | folder | Hub id)",
            file=sys.stderr,
        )
    return base


def find_base(base: str) -> pathlib.Path:
    """A short name, a folder or a Hub id -> local folder. Downloads only what is needed, never T5."""
    name = NAMED.get(base, base)
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(
            f"unknown base '{base}': use one of {', '.join(NAMED)}, a folder, or a Hub id like owner/name",
            2,
        )
    import huggingface_hub as hub

    errors, online = hub.errors, True
    try:
        try:
            names = hub.HfApi().list_repo_files(name)
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            raise
        except Exception:  # no network, or told to stay offline: what the cache holds must do
            names, online = [], False
        parts = [
            f
            for f in names
            if re.fullmatch(r"(transformer|vae|text_encoder(_2)?)/[^/]*(\.json|\.safetensors)", f)
        ]
        for part in {f.split("/")[0] for f in parts}:  # a variant only where there is nothing else
            if any(re.fullmatch(part + r"/[^/.]*\.safetensors", f) for f in parts):
                parts = [f for f in parts if not (f.startswith(part + "/") and VARIANT.search(f))]
        return pathlib.Path(
            hub.snapshot_download(
                name,
                local_files_only=not online,
                allow_patterns=[
                    "model_index.json",
                    "scheduler/*.json",
                    "tokenizer/*",
                    "tokenizer_2/*",
                    *parts,
                ],
            )
        )
    except errors.GatedRepoError:  # a kind of RepositoryNotFoundError, so first
        raise UserError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then `hf auth login` or set "
            "HF_TOKEN; or take the ungated --base bokeh, or a local folder"
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"the Hub has no repository {name}, or it is private: check the name, or `hf auth login`"
        )
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not in the local cache and the Hub cannot be reached: go online once, give --base a local folder in "
            "diffusers layout, or take --base tiny, which needs no network"
        )
    except Exception as error:  # a cut line, a full disk: the library has a class for each
        raise UserError(f"cannot download {name} ({why(error)}); run again to go on")


def load_base(
    base: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[MMDiT, VAE, Text, float]:
    """-> model (MMDiT), vae (VAE, always float32), text (Text), shift of the scheduler's time grid."""
    folder = find_base(base)
    if not (folder / "model_index.json").exists():
        raise UserError(
            f"{folder} has no model_index.json; a base is a folder in diffusers layout of the SD3 family"
        )
    if "StableDiffusion3" not in str(
        kind := read_json(folder / "model_index.json").get("_class_name")
    ):
        raise UserError(f"{folder} holds a {kind}; only the SD3 family can be a base here")
    model = load_part(MMDiT, folder / "transformer", device, dtype)
    vae = load_part(VAE, folder / "vae", device, torch.float32)
    tokenizers = []
    for name in ("tokenizer", "tokenizer_2"):
        try:
            tokenizers.append(Tokenizer(folder / name))
        except Exception as error:
            raise UserError(
                f"{folder / name} holds no CLIP tokenizer: vocab.json, merges.txt or tokenizer.json ({why(error)})"
            )
    text = Text(
        tokenizers,
        [
            load_part(CLIPText, folder / n, device, dtype)
            for n in ("text_encoder", "text_encoder_2")
        ],
    )
    try:
        for tokenizer, encoder in zip(tokenizers, text.encoders):
            if (
                max(tokenizer.vocab.values())
                >= encoder.embeddings["token_embedding"].num_embeddings
            ):
                raise ValueError("a tokenizer has more words than its encoder")
        # once through everything, with the smallest picture
        shift, side = (
            float(read_json(folder / "scheduler" / "scheduler_config.json").get("shift", 1.0)),
            model.patch * vae.factor,
        )
        with (
            torch.no_grad(),
            torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32),
        ):
            x = vae.encode(torch.zeros(1, 3, side, side, device=device))
            if vae.decode(model(x, torch.ones(1, device=device), text(["a"])).float()).shape != (
                1,
                3,
                side,
                side,
            ):
                raise ValueError("what goes in has another size than what comes out")
        if not 0 < shift < 1000 or model.sample_size > model.grid * model.patch:
            raise ValueError(f"shift {shift}, sample_size {model.sample_size}")
    except (ValueError, TypeError, RuntimeError, LookupError) as error:
        raise UserError(f"{folder}: its parts do not fit together ({why(error)})")
    return model, vae, text, shift
