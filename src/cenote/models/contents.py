"""The files of a checkpoint that hold weights or code: each is used, without effect, or refused."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cenote.errors import CheckpointError
from cenote.models import weights
from cenote.models.inside import DEPTH, inside
from cenote.models.reading import about, check_kind, load, read_json

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cenote.models.facts import Files

SKIPPED = (".", "__", "checkpoint-")
"""Beginnings of names that are passed over."""

ROUTER = "router_config.json"
GLINER = "gliner_config.json"

# fmt: off
RELEVANT = frozenset({
    ".py",
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".npy", ".npz", ".h5", ".msgpack",
    ".ot", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".pdparams", ".nemo",
})
# fmt: on
"""Endings of files that may hold code or weights."""

OTHER_FORMAT = "the same model in another format"
OF_TRAINING = "left over from training"

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
    "adapter_model.*": "an adapter's, which is read with its adapter_config.json",
}
"""Files that change no answer, by a pattern of the end of their path, each with the reason."""

LFS = b"version https://git-lfs"
POINTER_SIZE = 1024
"""Bytes that a Git LFS pointer has at most."""

FORMATS: Mapping[str, str] = {
    GLINER: "is a GLiNER checkpoint, whose heads over spans are not served; use the gliner package",
    "*.gguf": "has its weights as GGUF (llama.cpp) only",
    "*.onnx": "has its weights as ONNX only",
    "tf_model*.h5": "has its weights for TensorFlow only",
    "flax_model*.msgpack": "has its weights for Flax only",
    "consolidated*": "has its weights in Mistral's own format only",
}
"""Names of files by which a checkpoint without weights that can be read is known."""

FOLDER = "the checkpoint"
"""Name of the folder in the audit."""

REMEDY = "name the repository or folder that Transformers saved the model in, with config.json and safetensors"


def listing(folder: Path) -> tuple[str, ...]:
    """Return the paths of the files in `folder`, without hidden ones and without training's checkpoints."""
    names: list[str] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        relative = Path(place).relative_to(folder)
        names += [(relative / file).as_posix() for file in _visible(files)]
        folders[:] = _visible(folders)
        if len(relative.parts) == DEPTH:
            folders.clear()
    return tuple(sorted(names))


def _visible(names: Iterable[str]) -> list[str]:
    """Return `names` without those that are passed over."""
    return [name for name in names if not name.startswith(SKIPPED)]


def check(folder: Path, names: Iterable[str], checkpoint: str) -> None:
    """Refuse a folder of another tool, and one of a broken download.

    Args:
        folder: of the checkpoint.
        names: of its files.
        checkpoint: its name, for messages.

    Raises:
        CheckpointError: it is of a kind that is not served, or a file is a pointer of Git LFS.
    """
    check_kinds(folder)
    if (folder / GLINER).is_file():
        raise CheckpointError(f"{checkpoint} {FORMATS[GLINER]}")
    for name in names:
        if not _reason_in(IDLE, name) and _is_pointer(folder / name):
            raise CheckpointError(
                f"{name} of {checkpoint} is a pointer of Git LFS and not the file itself; run `git lfs pull` there, or "
                "download it again"
            )


def check_kinds(folder: Path) -> None:
    """Refuse a folder with something else than a file under the name of one.

    Raises:
        CheckpointError: there is a folder, a pipe, or a link to nothing.
    """
    with about(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        if path.suffix in NAMED and not path.name.startswith(SKIPPED):
            check_kind(path)


NAMED = frozenset({".json", ".jsonl", ".safetensors", ".bin", ".pt", ".txt", ".model", ".tiktoken", ".jinja", ".md"})
"""Endings of the files that readers open, Transformers among them."""


def check_config(folder: Path, checkpoint: str) -> None:
    """Refuse a backbone's folder without `config.json`, naming the format of the files that it has instead.

    Raises:
        CheckpointError: it has none.
    """
    if (folder / "config.json").is_file():
        return
    has = _format(folder) or "has no config.json"
    raise CheckpointError(f"{checkpoint} {has}; {REMEDY}")


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


def pickled_note(folder: Path, *, pickles: bool) -> tuple[str, ...]:
    """Return a note for the report at start, if the weights in `folder` are pickled."""
    names = weights.model_files(folder, pickles=pickles)
    if names[0].endswith(".safetensors"):
        return ()
    return (f"read by torch's restricted unpickler, as there are no safetensors: {', '.join(names)}",)


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
    root, backbone = files.path, files.folder
    modules = _module_folders(root)
    used = set(map(backbone.joinpath, read))
    for folder in (backbone, *modules):
        used.update(map(folder.joinpath, weights.model_files(folder, pickles=pickles)))
    reasons = {
        name: None if root / name in used else _reason(root, name, modules)
        for name in listed
        if Path(name).suffix in RELEVANT
    }
    files.audit.enter(FOLDER, reasons, "if it belongs to another tool, take it away", noun="the file")


def _reason(root: Path, name: str, modules: frozenset[Path]) -> str:
    """Return why a file that is not read changes no answer; empty if that is not known."""
    file = root / name
    if fnmatchcase(file.name, "pytorch_model*.bin") and weights.model_files(file.parent, pickles=False):
        return OTHER_FORMAT
    reason = _reason_in(IDLE, name)
    if reason or file.parent == root:
        return reason
    if modules and modules.isdisjoint(file.parents):
        return "of a module that modules.json does not name"
    return "a model of its own" if _is_model(file.parent) else ""


def _reason_in(table: Mapping[str, str], name: str) -> str:
    """Return the entry of the first pattern that the end of a path matches; empty if none does."""
    return next((reason for pattern, reason in table.items() if fnmatchcase(f"/{name}", f"*/{pattern}")), "")


def _is_model(folder: Path) -> bool:
    """Return whether a folder has a `config.json` of Transformers."""
    return "model_type" in load(folder / "config.json")


def _module_folders(root: Path) -> frozenset[Path]:
    """Return the folders of the modules that `modules.json` and Routers name, but for the checkpoint's own."""
    file = root / "modules.json"
    entries = read_json(file) if file.is_file() else []
    folders = {inside(root, entry["path"], file.name) for entry in entries}
    for router in (*root.glob(ROUTER), *root.glob(f"*/{ROUTER}")):
        folders.update(inside(router.parent, name, ROUTER) for name in read_json(router)["types"])
    return frozenset(folders - {root})


def _format(folder: Path) -> str:
    """Return the format of a folder without readable weights; empty if that is not known."""
    return next(filter(None, map(partial(_reason_in, FORMATS), listing(folder))), "")


def _is_pointer(file: Path) -> bool:
    """Return whether `file` is a pointer of Git LFS."""
    if file.suffix not in NAMED | RELEVANT:
        return False
    with about(file):
        if not file.is_file() or file.stat().st_size > POINTER_SIZE:
            return False
        with file.open("rb") as opened:
            return opened.read(len(LFS)) == LFS
