"""What touches the disk: files are read whole or refused, and written whole or not at all."""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent  # the project's folder


class UserError(Exception):
    """Something in the user's world is wrong: a file, a flag, the Hub.

    The message is one clear sentence; `code` is the exit code of the command.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def why(error: Exception) -> str:
    """The first line of an exception's message, to end a sentence with."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        data = json.loads(pathlib.Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})")
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no JSON object")
    return data


@contextlib.contextmanager
def open_tensors(path: pathlib.Path, device: str | torch.device = "cpu"):
    """An open safetensors file, whose tensors go to device.

    Raises UserError where the file cannot be opened, and also where reading a tensor fails later.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({why(error)})")


def read_tensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata. Raises UserError as open_tensors does."""
    with open_tensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, file.metadata() or {}


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside path; what is written there becomes path at the end.

    So path is complete or as it was before. Raises UserError where it cannot be written.
    """
    # no longer than path's own name, which may be as long as names can be
    tmp = path.with_name(f"{path.stem[:50]}{path.suffix}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old file's place
        tmp.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk, a folder without write permission
        raise UserError(f"{path} cannot be written ({error}); what was saved before is unharmed")
    finally:  # nothing half done stays, even where a clip turns out broken midway
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def write(path: pathlib.Path, text: str | dict) -> None:
    """Writes text, or data as JSON. Raises UserError as `replacing` does."""
    if not isinstance(text, str):
        text = json.dumps(text, indent=2) + "\n"
    with replacing(path) as tmp:
        tmp.write_text(text, "utf-8")


def write_tensors(path: pathlib.Path, tensors: dict[str, Tensor], **meta) -> None:
    """Writes a safetensors file; meta becomes its metadata, as strings. Raises UserError."""
    with replacing(path) as tmp:
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(tensors, tmp, {key: str(value) for key, value in meta.items()})
        tmp.chmod(0o644)  # safetensors lets only the owner read its files
