"""jina-embeddings-v3 as published: the LoRA adapters of all tasks stacked in the tensors of the model.

A changed weight is stored as torch's parametrization: `…weight.original`, and `…weight.0.lora_A` and `lora_B` with one
entry a task. The weights are loaded by their plain names; of each task an adapter in PEFT's layout is written into a
folder, so that requests choose among these adapters as among any others. The shapes are those of its `modeling_lora`:
a Linear gets `B @ A`, an Embedding `A @ B`, both times alpha / rank.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cenote.errors import CheckpointError
from cenote.models import weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from cenote.models.facts import Files

PLAIN = {r"\.parametrizations\.weight\.original$": ".weight"}
"""Names of changed weights to their plain names, for Transformers' `key_mapping`."""

PART = re.compile(r"(?:roberta\.)?(?P<module>.+)\.parametrizations\.weight\.0\.lora_(?P<half>[AB])")

RENAMED = (("encoder.layers.", "layers."), ("mixer.out_proj", "self_attn.o_proj"))
"""Parts of the names of modules, as published and in Transformers."""

TOGETHER = "mixer.Wqkv"
"""Name of the layer that Transformers has as three."""

NOT_RUN = "pooler."


def parts(names: Iterable[str]) -> list[str]:
    """Return the names of stacked tensors among those of a checkpoint, also as Transformers renames them."""
    return [name for name in names if PART.fullmatch(name)]


@contextmanager
def unstacked(files: Files, *, pickles: bool) -> Iterator[Path | None]:
    """Yield a folder that holds an adapter of each task meanwhile; `None` if the checkpoint has none.

    Raises:
        CheckpointError: the tensors are not those of the tasks that the config names.
    """
    names = parts(files.tensors)
    if not names:
        yield None
        return
    with TemporaryDirectory(prefix="cenote-adapters-") as target:
        _unstack(files, names, Path(target), pickles=pickles)
        yield Path(target)


def _unstack(files: Files, names: list[str], target: Path, *, pickles: bool) -> None:
    """Write an adapter of each task into a folder below `target`, out of the tensors called `names`."""
    tasks = list(getattr(files.config, "lora_adaptations", ()))
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights.tensors(files.folder, names, pickles=pickles).items():
        match = PART.fullmatch(name)
        assert match is not None
        if len(tensor) != len(tasks):
            raise CheckpointError(
                f"{files.name} has {len(tensor)} adapters in {name}, but lora_adaptations in config.json names "
                f"{len(tasks)}: {', '.join(tasks)}"
            )
        halves[match["module"]][match["half"]] = tensor
    for number, task in enumerate(tasks):
        tensors: dict[str, Tensor] = {}
        for module, pair in halves.items():
            if not module.startswith(NOT_RUN):
                tensors |= _of_module(module, pair["A"][number], pair["B"][number])
        _write(target / task, tensors, files.config)


def _of_module(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return one task's tensors of a module, by PEFT's names."""
    for published, name in RENAMED:
        module = module.replace(published, name)
    if module.startswith("embeddings."):
        return {f"{module}.lora_embedding_A": a.t().contiguous(), f"{module}.lora_embedding_B": b.t().contiguous()}
    if not module.endswith(TOGETHER):
        return {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
    tensors: dict[str, Tensor] = {}
    for part, rows in zip("qkv", b.chunk(3), strict=True):
        path = module.replace(TOGETHER, f"self_attn.{part}_proj")
        tensors |= {f"{path}.lora_A.weight": a.clone(), f"{path}.lora_B.weight": rows.contiguous()}
    return tensors


def _write(folder: Path, tensors: dict[str, Tensor], config: Any) -> None:
    """Write an adapter in PEFT's layout."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": config.lora_rank, "lora_alpha": config.lora_alpha}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
