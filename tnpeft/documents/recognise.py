"""What a file is, by its first bytes, when it is not what was asked for: nothing is parsed, run or unpacked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tnpeft.documents.paths import is_file, is_folder

__all__ = ["FileKind", "recognise"]

_HEAD = 4096
_TAIL = 65_536  # of a zip, where the names of its members stand
_MAX_HEADER = 100_000_000  # what the safetensors library reads

_UNPACK = "Unpack it, and pass the file inside."
_EXPORT = "Save the weights as safetensors with the library that made it."
_MAGIC = (
    (b"\x1f\x8b", "gzip", "a gzip archive", _UNPACK),
    (b"BZh", "bzip2", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "xz", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "7z", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "rar", "a rar archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "hdf5", "an HDF5 file", _EXPORT),
    (b"GGUF", "gguf", "a GGUF file", "Pass the safetensors that it was made from."),
    (b"\x93NUMPY", "npy", "a numpy array", _EXPORT),
    (b"\x89PNG\r\n", "png", "a PNG picture", ""),
    (b"%PDF-", "pdf", "a PDF document", ""),
    (b"\x7fELF", "elf", "a program", ""),
)


@dataclass(frozen=True)
class FileKind:
    """A kind of file: `name` is for programs, `text`, with its article, for messages, `fix` a sentence or empty."""

    name: str
    text: str
    fix: str = ""


def recognise(path: Path) -> FileKind | None:
    """The kind of the file at `path`, of those often mistaken; None for all others, and if it cannot be read."""
    try:
        if is_folder(path):
            return _folder(path)
        with path.open("rb") as file:
            head = file.read(_HEAD)
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL) if head.startswith(b"PK") else b""
    except (OSError, ValueError):
        return None
    return _of_bytes(path, head, tail, size)


def _folder(path: Path) -> FileKind:
    if is_file(path / "adapter_config.json"):
        return FileKind("peft", "a folder with PEFT's adapter", "Put it on a model with `tnpeft.load_foreign`.")
    files = sorted(file.name for file in path.glob("*.safetensors"))
    return FileKind("folder", "a folder", f"Name a file in it, for example `{files[0]}`." if files else "")


def _of_bytes(path: Path, head: bytes, tail: bytes, size: int) -> FileKind | None:
    if not head:
        return FileKind("empty", "an empty file")
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return _safetensors(path, int.from_bytes(head[:8], "little"), size)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(head, tail)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        fix = "Pass safetensors: a pickle can run anything when it is loaded."
        return FileKind("pickle", "a pickle", fix)
    if head[257:262] == b"ustar":
        return FileKind("tar", "a tar archive", _UNPACK)
    if head[4:8] == b"TFL3":
        return FileKind("tflite", "a TensorFlow Lite model", _EXPORT)
    for magic, name, text, fix in _MAGIC:
        if head.startswith(magic):
            return FileKind(name, text, fix)
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a"):  # a model's version, then a field
        return FileKind("onnx", "an ONNX model", "Pass the weights that it was exported from.")
    return _text(head)


def _safetensors(path: Path, length: int, size: int) -> FileKind:
    """A safetensors file with a complete header, tnpeft's or not; the safetensors library reports other faults."""
    if 8 + length > size:
        return FileKind("cut", "a safetensors file that ends within its header")
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        metadata = header.get("__metadata__") or {}
        ours = "tnpeft" in metadata
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return FileKind("safetensors", "a safetensors file with a damaged header")
    fix = f"`tnpeft inspect {path.name}` shows it."
    if ours:
        return FileKind("adapter", "an adapter file", f"{fix} `tnpeft.load` puts it on a model.")
    return FileKind("safetensors", "a safetensors file", fix)


def _zip(head: bytes, tail: bytes) -> FileKind:
    if b"/constants.pkl" in tail:
        return FileKind("torchscript", "a TorchScript archive", "Pass the weights of the model that it was made from.")
    if b"/data.pkl" in head or b"/data.pkl" in tail:
        return FileKind("torch", "a torch pickle")
    return FileKind("zip", "a zip archive", _UNPACK)


def _text(head: bytes) -> FileKind | None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return FileKind("lfs", "a pointer of git-lfs, not the file itself", "Run `git lfs pull` where it was cloned.")
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")):
        fix = "Download the file itself: on the Hugging Face Hub its address has `resolve`, not `blob`."
        return FileKind("html", "a web page", fix)
    if start.startswith(b"<?xml"):
        return FileKind("xml", "an XML document", "Download the file itself.")
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    if not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return None
    if start.startswith((b"{", b"[")):
        return FileKind("json", "a JSON file")
    return FileKind("text", "a text file")
