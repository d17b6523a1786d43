"""The files of a checkpoint: which of them hold weights or code, and what becomes of each."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cenote.errors import CheckpointError
from cenote.models import weights
from cenote.models.sentence_transformers import read_json

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cenote.models.facts import Files

DEPTH = 3
"""Levels of folders that are looked into."""

# fmt: off
WEIGHTS = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".npy", ".npz", ".h5", ".msgpack",
    ".ot", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".pdparams", ".nemo",
})
# fmt: on
"""Endings of files that may hold weights."""

OTHER_FORMAT = "the same model in another format"
OF_TRAINING = "left over from training"
ADAPTER = "an adapter's, which is read with its adapter_config.json"

IDLE: Mapping[str, str] = {
    "onnx/*": OTHER_FORMAT,
    "*.onnx": OTHER_FORMAT,
    "*.onnx_data": OTHER_FORMAT,
    "openvino/*": OTHER_FORMAT,
    "openvino_*": OTHER_FORMAT,
    "coreml/*": OTHER_FORMAT,
    "*.mlmodel": OTHER_FORMAT,
    "*.mlpackage/*": OTHER_FORMAT,
    "*.tflite": OTHER_FORMAT,
    "tf_model*.h5": OTHER_FORMAT,
    "flax_model*.msgpack": OTHER_FORMAT,
    "rust_model.ot": OTHER_FORMAT,
    "gguf/*": OTHER_FORMAT,
    "*.gguf": OTHER_FORMAT,
    "original/*": OTHER_FORMAT,
    "consolidated*": OTHER_FORMAT,
    "model.*.safetensors": "another variant of the weights",
    "pytorch_model.*.bin": "another variant of the weights",
    "checkpoint-*": OF_TRAINING,
    "global_step*": OF_TRAINING,
    "optimizer*": OF_TRAINING,
    "scheduler*": OF_TRAINING,
    "scaler*": OF_TRAINING,
    "rng_state*": OF_TRAINING,
    "random_states*": OF_TRAINING,
    "training_args.bin": OF_TRAINING,
    "zero_to_fp32.py": OF_TRAINING,
    "handler.py": "code of a web service around the model",
    "*.py": "code that is run only where a config names it",
    "adapter_model.*": ADAPTER,
}
"""Files that change no answer, by a pattern of their path or their name, each with the reason."""

LFS = b"version https://git-lfs"
POINTER_SIZE = 1024
"""Bytes that a Git LFS pointer has at most."""

FORMATS: Mapping[str, str] = {
    "gliner_config.json": "is a GLiNER checkpoint, whose heads over spans are not served; use the gliner package",
    "*.gguf": "has its weights as GGUF (llama.cpp) only",
    "*.onnx": "has its weights as ONNX only",
    "tf_model*.h5": "has its weights for TensorFlow only",
    "flax_model*.msgpack": "has its weights for Flax only",
    "consolidated*": "has its weights in Mistral's own format only",
}
"""Names of files by which a checkpoint without weights that can be read is known."""

REMEDY = "name the repository or folder with its safetensors"


def listing(folder: Path) -> tuple[str, ...]:
    """Return the paths of the files in `folder`, without hidden ones and without training's checkpoints."""
    names: list[str] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        relative = Path(place).relative_to(folder)
        names += [(relative / file).as_posix() for file in files if not file.startswith(".")]
        depth = len(relative.parts)
        kept = [name for name in folders if not name.startswith((".", "__", "checkpoint-"))]
        folders[:] = sorted(kept) if depth < DEPTH else []
    return tuple(sorted(names))


def idle_reason(name: str) -> str:
    """Return why the file at the path `name` changes no answer; empty if that is not known."""
    last = name.rpartition("/")[2]
    return next((why for pattern, why in IDLE.items() if fnmatchcase(name, pattern) or fnmatchcase(last, pattern)), "")


def check(folder: Path, names: Iterable[str], checkpoint: str) -> None:
    """Refuse a folder whose files are not what they seem.

    Args:
        folder: of the checkpoint.
        names: of its files.
        checkpoint: its name, for messages.

    Raises:
        CheckpointError: it is of a kind that is not served, or a file is a pointer of Git LFS.
    """
    if (folder / "gliner_config.json").is_file():
        raise CheckpointError(f"{checkpoint} {FORMATS['gliner_config.json']}")
    for name in names:
        if not idle_reason(name) and _is_pointer(folder / name):
            raise CheckpointError(
                f"{name} of {checkpoint} is a pointer of Git LFS and not the file itself; run `git lfs pull` there, or "
                "download it again"
            )


def check_config(folder: Path, checkpoint: str) -> None:
    """Refuse a backbone's folder without `config.json`, by what it has in its place.

    Raises:
        CheckpointError: it has none.
    """
    if (folder / "config.json").is_file():
        return
    has = _format(folder)
    if has:
        raise CheckpointError(f"{checkpoint} {has}; {REMEDY}")
    raise CheckpointError(f"{checkpoint} has no config.json; name the folder that Transformers saved the model in")


def check_weights(folder: Path, checkpoint: str, *, pickles: bool) -> None:
    """Refuse a backbone's folder without weights that can be read.

    Raises:
        CheckpointError: it has none, or only pickles and these are not wanted.
    """
    if weights.model_files(folder, pickles=pickles):
        return
    if weights.model_files(folder, pickles=True):
        raise CheckpointError(f"{checkpoint} has pickled weights only, and --safetensors-only refuses them")
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise CheckpointError(f"{checkpoint} has {shards[0].name}, but no model.safetensors.index.json; add the index")
    has = _format(folder) or "has neither model.safetensors nor pytorch_model.bin"
    raise CheckpointError(f"{checkpoint} {has}; {REMEDY}")


def audit(files: Files, listed: Iterable[str], read: Collection[str], *, pickles: bool) -> None:
    """Enter the files that hold weights or code into the audit.

    Args:
        files: the checkpoint.
        listed: paths of its files, also of those that were not downloaded.
        read: names of files that its family reads.
        pickles: pickles are read.

    Raises:
        CheckpointError: nothing reads one of them.
    """
    backbone = files.folder.relative_to(files.path).as_posix() if files.folder.is_relative_to(files.path) else "."
    used = {_joined(backbone, name) for name in weights.model_files(files.folder, pickles=pickles)}
    used |= {_joined(place, name) for place in (".", backbone) for name in read}
    modules = _module_folders(files.path)
    unread = []
    for name in listed:
        suffix = Path(name).suffix
        if suffix not in WEIGHTS and suffix != ".py":
            continue
        reason = _reason(files.path, name, modules)
        if name in used or _is_of_module(files.path, name, modules):
            files.audit.use(FOLDER, name)
        elif reason:
            files.audit.leave(FOLDER, [name], reason)
        else:
            unread.append(name)
    files.audit.refuse(FOLDER, unread, "if it belongs to another tool, take it away", noun="the file")


FOLDER = "the checkpoint"
"""Name of the folder in the audit."""


def _reason(folder: Path, name: str, modules: Collection[str]) -> str:
    """Return why a file that is not read changes no answer; empty if that is not known."""
    parent, _, last = name.rpartition("/")
    top = name.partition("/")[0]
    if weights.model_files(folder / parent, pickles=False) and fnmatchcase(last, "pytorch_model*.bin"):
        return OTHER_FORMAT
    if parent and modules and top not in modules:
        return "of a module that modules.json does not name"
    if parent and (folder / parent / "adapter_config.json").is_file():
        return ADAPTER
    why = idle_reason(name)
    if not why and parent and "model_type" in _config(folder / parent):
        return "a model of its own"
    return why


def _config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `config.json`; empty if it has none."""
    file = folder / "config.json"
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _module_folders(folder: Path) -> frozenset[str]:
    """Return the first parts of the paths of the modules that `modules.json` or a Router names."""
    paths: list[str] = []
    if (folder / "modules.json").is_file():
        paths += [str(entry["path"]) for entry in read_json(folder / "modules.json")]
    routers = [path for path in ("", *paths) if (folder / path / "router_config.json").is_file()]
    for router in routers:
        paths += [_joined(router, str(path)) for path in read_json(folder / router / "router_config.json")["types"]]
    return frozenset(path.partition("/")[0] for path in paths if path)


def _is_of_module(folder: Path, name: str, modules: Collection[str]) -> bool:
    """Return whether a file holds the weights of a module of Sentence-Transformers."""
    parent, _, last = name.rpartition("/")
    if name.partition("/")[0] not in modules or not parent:
        return False
    return last in weights.model_files(folder / parent, pickles=True)


def _joined(folder: str, name: str) -> str:
    return name if folder in ("", ".") else f"{folder}/{name}"


def _format(folder: Path) -> str:
    """Return what a folder without readable weights has; empty if that is not known."""
    names = [name.rpartition("/")[2] for name in listing(folder)]
    found = (why for pattern, why in FORMATS.items() if any(fnmatchcase(name, pattern) for name in names))
    return next(found, "")


def _is_pointer(file: Path) -> bool:
    """Return whether `file` is a pointer of Git LFS."""
    if not file.is_file() or file.stat().st_size > POINTER_SIZE:
        return False
    return file.read_bytes().startswith(LFS)
