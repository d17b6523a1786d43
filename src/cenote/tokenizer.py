"""A checkpoint's tokenizer, made alike where the model runs and where text is only rendered, there without torch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping  # noqa: TC003 (msgspec reads the annotations of `TokenizerSource`)
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TYPE_IDS = "token_type_ids"
"""Name of the input that tells the two texts of a pair apart."""

QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
"""Environment variable that keeps Transformers from reporting that torch was not found."""


def import_without_torch() -> None:
    """Import Transformers as if torch were not installed; its tokenizers do not need it.

    Transformers looks for torch once. In this process its models do not exist from then on. Torch itself can still be
    imported.

    Raises:
        RuntimeError: torch or Transformers is imported already.
    """
    imported = list(filter(sys.modules.__contains__, ("torch", "transformers")))
    if imported:
        raise RuntimeError(f"{' and '.join(imported)} is imported already, and torch cannot be left out any more")
    sys.modules["torch"] = None  # type: ignore[assignment] # to import it is an ImportError, to look for it finds nothing
    try:
        with without_advice():
            from transformers.utils.import_utils import is_torch_available

        assert not is_torch_available()
    finally:
        del sys.modules["torch"]


@contextmanager
def without_advice() -> Iterator[None]:
    """Keep Transformers from reporting that torch was not found, which it looks for at some imports of its parts."""
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The files of a tokenizer, and changes to it.

    Attributes:
        path: folder of its files.
        trust_remote_code: run Python code that the folder brings.
        chat_template: Jinja template instead of its own; `None` = its own.
        whole: texts that it must not take apart, see `keep_whole`.
        kwargs: arguments with which it is made.
        type_ids: whether it gives token type ids; `None` = as its files say.
    """

    path: str
    trust_remote_code: bool = False
    chat_template: str | None = None
    whole: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    type_ids: bool | None = None


def load(source: TokenizerSource) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `source`.

    Raises:
        OSError: there are no files.
        ValueError: they are not understood; also `KeyError` and `ImportError`, as Transformers raises them.
    """
    ends = _ends(Path(source.path))
    runs_code = source.trust_remote_code and bool(references(config(Path(source.path)))) and not ends
    tokenizer: PreTrainedTokenizerBase = _kind(Path(source.path)).from_pretrained(
        source.path,
        trust_remote_code=runs_code,  # that of the model's config would run, too, or be asked of the hub
        config=_model_config(Path(source.path)),
        **source.kwargs,
    )
    for name, is_added in ends.items():
        setattr(tokenizer, name, is_added)  # Transformers then makes the ends of texts anew
    if source.type_ids is not None:
        others = [name for name in tokenizer.model_input_names if name != TYPE_IDS]
        tokenizer.model_input_names = [*others, TYPE_IDS] if source.type_ids else others
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    keep_whole(tokenizer, source.whole)
    return tokenizer


def try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise a text and a pair, because a damaged tokenizer may read well and fail at the first text.

    Raises:
        BaseException: whatever the tokenizer raises; a panic of the tokenizers package is no `Exception`.
    """
    tokenizer("a")
    if tokenizer.is_fast:
        tokenizer("a", "a")


QWEN2 = frozenset({"tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"})
"""gte-Qwen2's code, which differs from Transformers' own only in the first and last token of a text."""

INTERNLM2 = frozenset(
    {"tokenization_internlm2.InternLM2Tokenizer", "tokenization_internlm2_fast.InternLM2TokenizerFast"}
)
"""InternLM2's code, which is Llama's but for what `_internlm2` says."""

NATIVE = QWEN2 | INTERNLM2
"""Code of tokenizers that Transformers' own do the same as."""


def _kind(folder: Path) -> Any:
    """Return the class that loads the tokenizer of a folder."""
    from transformers import AutoTokenizer

    has_model_alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    return _internlm2() if has_model_alone and references(config(folder)) & INTERNLM2 else AutoTokenizer


def _internlm2() -> Any:
    """Return a class that makes a tokenizer of InternLM2's sentencepiece model.

    Llama's puts a space before every text, and InternLM2's only if the model says so, then also behind special tokens.
    `added_tokens_decoder` gives other texts to unused entries of the vocabulary; Llama's would add them behind it,
    where there is no embedding.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers.normalizers import Prepend, Replace, Sequence
    from transformers import LlamaTokenizer

    class InternLM2Tokenizer(LlamaTokenizer):
        def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> None:
            texts = {number: str(token) for number, token in options.get("added_tokens_decoder", {}).items()}
            vocab = {texts.get(number, piece): number for piece, number in vocab.items()}
            merges = [merge for merge in merges if vocab.keys() >= {*merge, "".join(merge)}]
            super().__init__(vocab=vocab, merges=merges, **options)
            model = SentencePieceProcessor(model_file=options["vocab_file"])
            has_prefix = model.encode("a", out_type=str)[0].startswith(SPACE)
            spaces = [Replace(" ", SPACE)]
            self.backend_tokenizer.normalizer = Sequence([Prepend(SPACE), *spaces] if has_prefix else spaces)
            self.backend_tokenizer.pre_tokenizer = None

    return InternLM2Tokenizer


SPACE = "\u2581"
"""A space in the pieces of sentencepiece."""


CODE = re.compile(r'"(?:[^"]*--)?([^"]+\.[^"]+)"')
"""Import paths in an `auto_map`, whose keys have no dot; the repository before them is left out."""


def _model_config(folder: Path) -> PretrainedConfig | None:
    """Return the config by which the class of a tokenizer is chosen; `None` = Transformers reads it by itself.

    It does not where a dtype is written as torch prints it, `torch.float16`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = _json(folder / "config.json")
    dtypes = f"{content.pop('dtype', '')} {content.pop('torch_dtype', '')}"
    if "torch." not in dtypes:
        return None
    content.pop("auto_map", None)
    chosen: PretrainedConfig = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    return chosen


def references(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the classes that a `tokenizer_config.json` names as its code, without the repositories they lie in."""
    return frozenset(CODE.findall(json.dumps(config.get("auto_map"))))


def config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `tokenizer_config.json`; empty if it has none."""
    return _json(folder / "tokenizer_config.json")


def _ends(folder: Path) -> dict[str, bool]:
    """Return whether the first and last token are put around texts, where Transformers' tokenizer has to be told."""
    content = config(folder)
    if not references(content) & NATIVE:
        return {}
    begins = bool(references(content) & INTERNLM2)
    return {
        "add_bos_token": bool(content.get("add_bos_token", begins)),
        "add_eos_token": bool(content.get("add_eos_token")),
    }


def _json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is not there."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def keep_whole(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Make `texts`, or their first words, special tokens where the vocabulary has them.

    A text that begins with one begins with one token then.
    """
    from tokenizers import AddedToken

    texts = [*texts]
    vocabulary = tokenizer.get_vocab() if texts else {}  # a copy of all of it
    split = []
    for text in texts:
        spellings = (text, *text.split(None, 1)[:1])
        token = next(filter(vocabulary.__contains__, spellings), None)
        if token is not None and tokenizer.tokenize(token) != [token]:
            split.append(AddedToken(token, normalized=False, special=True))
    if split:
        tokenizer.add_special_tokens({"additional_special_tokens": split})
