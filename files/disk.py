"""What touches the disk: files that are read whole or refused, and written whole or not at all."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something in the user's world is wrong; the message is one clear sentence. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def why(error: Exception) -> str:
    """The first line of what an exception says, for a sentence to end with."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def read_json(path: pathlib.Path) -> dict:
    try:
        data = json.loads(pathlib.Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})")
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no JSON object")
    return data


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, device: str | torch.device = "cpu"):
    """An open safetensors file. Raises UserError where it cannot be read, also while it is read."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({why(error)})")


def read_tensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file and its metadata."""
    with open_tensors(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside path; what was written there becomes path, which is complete or as it was before."""
    tmp = path.with_name(
        f"{path.stem[:50]}{path.suffix}.tmp"
    )  # no longer than path's own, which may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old one's place
        tmp.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk, a folder one may not write to
        raise UserError(f"{path} cannot be written ({error}); what was saved before is unharmed")
    finally:  # nothing half done stays, also where a clip turns out broken midway
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def write(path: pathlib.Path, text: str | dict) -> None:
    """Text, or data as JSON."""
    with replacing(path) as tmp:
        tmp.write_text(
            text if isinstance(text, str) else json.dumps(text, indent=2) + "\n", "utf-8"
        )


def write_tensors(path: pathlib.Path, tensors: dict[str, Tensor], **meta) -> None:
    with replacing(path) as tmp:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            tmp,
            {k: str(v) for k, v in meta.items()},
        )
        tmp.chmod(0o644)  # safetensors' files can be read by their owner alone
