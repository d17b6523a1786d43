"""Language models that rerank: which token's logit is the score, and the prompt that they were trained on.

A checkpoint is recognised by its own files where they say (Sentence-Transformers' `LogitScore`, config keys), and
else by its name or the title of its model card. Prompts are Jinja templates over two messages, `query` and
`document`, exact to the blank; they are facts of the checkpoints (their model cards and repositories), as is which of
their parts are tokenised apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cenote.conventions import PairTemplate


@dataclass(frozen=True)
class Reranker:
    """One row of the table.

    Attributes:
        pattern: regular expression for the checkpoint's name.
        model_type: `model_type` of its config.
        tokens: vocabulary entries whose logits count.
        difference: the score is the second token's logit minus the first's.
        prompt: of a pair.
        sigma: divisor of the logit before the sigmoid.
    """

    name: str
    pattern: str
    model_type: str
    tokens: tuple[str, ...]
    difference: bool
    prompt: PairTemplate
    sigma: float = 1.0


_QUERY_DOCUMENT = (
    "{%- set query = (messages | selectattr('role', 'eq', 'query') | first).content -%}"
    "{%- set document = (messages | selectattr('role', 'eq', 'document') | first).content -%}"
)

_BREAK = "{{ '\n' }}"
"""A line break that is a text of its own."""


def _literal(text: str) -> str:
    """Return a template of `text` alone, whose last line break Jinja keeps."""
    return text + "{# the end stays #}"


_QWEN3_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_QWEN3_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

QWEN3 = PairTemplate(
    _QUERY_DOCUMENT
    + "{%- set system = messages | selectattr('role', 'eq', 'system') | first -%}"
    + "{%- set default = 'Given a web search query, retrieve relevant passages that answer the query' -%}"
    + "{%- set instruction = instruction or instruct or (system.content if system else '') or default -%}"
    + f"{_QWEN3_PREFIX}<Instruct>: {{{{ instruction }}}}\n<Query>: {{{{ query }}}}\n<Document>: {{{{ document }}}}"
    + _literal(_QWEN3_SUFFIX),
    prefix=_QWEN3_PREFIX,
    suffix=_QWEN3_SUFFIX,
)

_CHATML_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

QWEN3_VL = PairTemplate(
    _QUERY_DOCUMENT
    + "{%- set default = 'Given a search query, retrieve relevant candidates that answer the query.' -%}"
    + "{%- set instruction = instruction or instruct or default -%}"
    + f"{_QWEN3_PREFIX}<Instruct>: {{{{ instruction }}}}<Query>:{{{{ query or 'NULL' }}}}\n"
    + "<Document>:{{ document or 'NULL' }}"
    + _literal(_CHATML_SUFFIX),
    prefix=_QWEN3_PREFIX,
    suffix=_CHATML_SUFFIX,
)

ORIGINAL = {"qwen3_vl": QWEN3_VL}
"""Prompts of configs that say `is_original_qwen3_reranker`, by `model_type`; `QWEN3` for all others."""

_GEMMA_TASK = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)

GEMMA = PairTemplate(
    None,
    parts=(
        _QUERY_DOCUMENT + "A: {{ query }}",
        _BREAK,
        _QUERY_DOCUMENT + "B: {{ document }}",
        _BREAK,
        f'{{{{ instruction or "{_GEMMA_TASK}" }}}}',
    ),
    bos=True,
    prefix="A: ",
    suffix=f"\n{_GEMMA_TASK}",
)

_MXBAI_PREFIX = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
_MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 "
    "for not relevant, 1 for relevant).\nRelevance:"
)

MXBAI = PairTemplate(
    None,
    parts=(
        _literal(_MXBAI_PREFIX),
        _QUERY_DOCUMENT + "{% if instruction %}instruction: {{ instruction }}\n{% endif %}query: {{ query }}",
        _BREAK,
        _QUERY_DOCUMENT + "document: {{ document }}",
        _BREAK,
        _MXBAI_TASK,
        _literal(_CHATML_SUFFIX),
    ),
    prefix=_MXBAI_PREFIX,
    suffix=f"\n{_MXBAI_TASK}{_CHATML_SUFFIX}",
)

_ZERANK_PREFIX = "<|im_start|>system\n"

ZERANK = PairTemplate(
    _QUERY_DOCUMENT
    + _ZERANK_PREFIX
    + "{% if instruction %}<query>{{ query }}</query>\n<instruction>{{ instruction }}</instruction>"
    + "{% else %}{{ query }}{% endif %}<|im_end|>\n<|im_start|>user\n{{ document }}"
    + _literal(_CHATML_SUFFIX),
    prefix=_ZERANK_PREFIX,
    suffix=_CHATML_SUFFIX,
)

RERANKERS: tuple[Reranker, ...] = (
    Reranker("Qwen3-Reranker", r"qwen3-reranker", "qwen3", ("no", "yes"), True, QWEN3),
    Reranker("Qwen3-VL-Reranker", r"qwen3-vl-reranker", "qwen3_vl", ("no", "yes"), True, QWEN3_VL),
    Reranker("bge-reranker-v2-gemma", r"bge-reranker-v2-gemma", "gemma", ("Yes",), False, GEMMA),
    Reranker("mxbai-rerank-v2", r"mxbai-rerank-\w+-v2", "qwen2", ("0", "1"), True, MXBAI),
    Reranker("zerank", r"zerank-\d", "qwen3", ("Yes",), False, ZERANK, sigma=5.0),
)


def recognise(names: list[str], model_type: str) -> Reranker | None:
    """Return the row for a checkpoint of one of `names` whose config has `model_type`; `None` if there is none."""
    spelled = [re.sub(r"[\s_]+", "-", name.lower()) for name in names]
    for row in RERANKERS:
        if row.model_type == model_type and any(re.search(row.pattern, name) for name in spelled):
            return row
    return None
