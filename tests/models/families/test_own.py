"""Model classes of one's own that say what they offer, against the same arithmetic in plain torch."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cenote import LLM, default_pooling_type, register_model
from cenote.config import ServerConfig
from cenote.errors import CheckpointError
from cenote.server.app import build
from tests import checkpoints
from tests.checkpoints import HIDDEN, SHORT

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WIDTH, LABELS = 12, 3
TEXTS = [text for text in SHORT if text]


def _fresh(name: str, **members: Any) -> type[PreTrainedModel]:
    """A BERT class called `name` with further layers and members, registered under a model type of its own."""
    kind = type(f"{name}Config", (BertConfig,), {"model_type": name.lower()})

    def __init__(self: Any, config: Any) -> None:
        BertModel.__init__(self, config)
        self.weigh = nn.Linear(HIDDEN, 1)
        self.narrow = nn.Linear(HIDDEN, WIDTH)
        self.score = nn.Linear(HIDDEN, LABELS)
        self.post_init()

    model: type[PreTrainedModel] = type(name, (BertModel,), {"config_class": kind, "__init__": __init__, **members})
    return model


def _pool(self: Any, states: Tensor, token_ids: Tensor) -> Tensor:
    """A mean weighted by a layer over the tokens, but for those of an even id."""
    weights = self.weigh(states).squeeze(-1).masked_fill(token_ids % 2 == 0, -1e4).softmax(-1)
    return weights @ states


def _project(self: Any, rows: Tensor) -> Tensor:
    return torch.tanh(self.narrow(rows))


def _head(self: Any, rows: Tensor) -> Tensor:
    return self.score(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the tensors of all three layers."""
    folder = checkpoints.bert(tmp_path_factory.mktemp("own") / "lake")
    generator = torch.Generator().manual_seed(3)
    layers = {"weigh": (1, HIDDEN), "narrow": (WIDTH, HIDDEN), "score": (LABELS, HIDDEN)}
    added = {f"{name}.weight": torch.randn(shape, generator=generator) / 3 for name, shape in layers.items()}
    added |= {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in layers.items()}
    file = folder / "model.safetensors"
    save_file({**load_file(file), **added}, file, metadata={"format": "pt"})
    return folder


def _checkpoint(folder: Path, target: Path, model: type[PreTrainedModel]) -> Path:
    shutil.copytree(folder, target)
    checkpoints.edit_json(target / "config.json", model_type=model.__name__.lower(), architectures=[model.__name__])
    register_model(model)
    return target


def _states(folder: Path, text: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Last hidden states `[T, D]` and ids `[T]` of a text, by Transformers alone, and the checkpoint's tensors."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    config = BertConfig.from_pretrained(folder, attn_implementation="eager")
    model = BertModel(config).eval()
    model.load_state_dict({name: weights[name] for name in model.state_dict() if name in weights}, strict=False)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0], inputs["input_ids"][0], weights


def _linear(name: str, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _weighted(folder: Path, text: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The pooled row and the states of a text, and the tensors."""
    states, ids, weights = _states(folder, text)
    scores = _linear("weigh", states, weights).squeeze(-1)
    scores[ids % 2 == 0] = -1e4
    return scores.softmax(-1) @ states, states, weights


def _close(mine: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(mine), np.asarray(expected), rtol=0, atol=2e-5)


def test_own_pooling_and_projection(folder: Path, tmp_path: Path) -> None:
    """Vectors of whole texts are pooled by the class; those of texts and of tokens pass its projection."""
    model = _fresh("LakeVectors", tasks=("embed", "token_embed"), pool=_pool, project=_project)
    with LLM(model=str(_checkpoint(folder, tmp_path / "model", model))) as llm:
        assert (llm.info.tasks, llm.info.default_task, llm.info.dimension) == (
            ("embed", "token_embed"),
            "embed",
            WIDTH,
        )
        assert llm.info.report.layout == "packed"
        vectors = [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]
        matrices = llm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
    for text, vector, matrix in zip(TEXTS, vectors, matrices, strict=True):
        pooled, states, weights = _weighted(folder, text)
        _close(vector, nn.functional.normalize(torch.tanh(_linear("narrow", pooled, weights)), dim=-1))
        rows = nn.functional.normalize(torch.tanh(_linear("narrow", states, weights)), dim=-1)
        _close(matrix.outputs.data, rows)


def test_own_head(folder: Path, tmp_path: Path) -> None:
    """Classes of whole texts, over the class's own pooling, and of tokens; from Python and over HTTP."""
    model = _fresh("LakeClasses", tasks=("classify", "token_classify"), pool=_pool, head=_head)
    with LLM(model=str(_checkpoint(folder, tmp_path / "model", model))) as llm:
        assert (llm.info.tasks[:2], llm.info.num_labels) == (("classify", "token_classify"), LABELS)
        classes = [output.outputs.probs for output in llm.classify(TEXTS, use_tqdm=False)]
        rows = llm.encode(TEXTS, pooling_task="token_classify", use_tqdm=False)
        with TestClient(build([llm._service], ServerConfig())) as client:
            answer = client.post("/classify", json={"input": TEXTS}).json()
    for i, text in enumerate(TEXTS):
        pooled, states, weights = _weighted(folder, text)
        _close(classes[i], _linear("score", pooled, weights).softmax(-1))
        _close(answer["data"][i]["probs"], classes[i])
        _close(rows[i].outputs.data, _linear("score", states, weights).softmax(-1))


def test_the_user_still_chooses_the_pooling(folder: Path, tmp_path: Path) -> None:
    """A pooling type of the options goes before the class's pooling."""
    model = _fresh("LakeAsked", tasks=("embed",), pool=_pool)
    checkpoint = _checkpoint(folder, tmp_path / "model", model)
    with LLM(model=str(checkpoint), pooler_config={"pooling_type": "CLS"}) as llm:
        (output,) = llm.embed(TEXTS[0], use_tqdm=False)
    _close(output.outputs.embedding, nn.functional.normalize(_states(folder, TEXTS[0])[0][0], dim=-1))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"tasks": ("rank",)}, r"LakeBad0.tasks is \('rank',\); expected some of embed, token_embed, classify"),
        ({"tasks": ()}, r"LakeBad1.tasks is \(\); expected some of"),
        ({"tasks": ("embed", "classify")}, r"LakeBad2.tasks names classify, which needs a method `head\(rows\)`"),
    ],
)
def test_tasks_that_a_class_cannot_give(folder: Path, tmp_path: Path, members: dict[str, Any], words: str) -> None:
    """An unknown task, none, and one without its method are refused with the class's name."""
    model = _fresh(words.partition(".")[0], **members)
    with pytest.raises(CheckpointError, match=words):
        LLM(model=str(_checkpoint(folder, tmp_path / "model", model)))


def test_token_tasks_by_default(folder: Path, tmp_path: Path) -> None:
    """A class that pools ALL serves the rows of tokens first."""
    model = default_pooling_type(tok_pooling_type="ALL")(_fresh("LakeAll"))
    with LLM(model=str(_checkpoint(folder, tmp_path / "model", model))) as llm:
        assert (llm.info.default_task, llm.info.vector_task) == ("token_embed", "token_embed")
        (output,) = llm.encode(TEXTS[0], use_tqdm=False)
    _close(output.outputs.data, nn.functional.normalize(_states(folder, TEXTS[0])[0], dim=-1))


def test_steps_by_default(folder: Path, tmp_path: Path) -> None:
    """A class that pools STEP rates the rows of its step tag, whose id the options name."""
    model = default_pooling_type("STEP")(_fresh("LakeSteps", tasks=("token_classify",), head=_head))
    checkpoint = _checkpoint(folder, tmp_path / "model", model)
    tag = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("fox")
    text = "quick fox and brown fox"
    with LLM(model=str(checkpoint), pooler_config={"step_tag_id": tag}) as llm:
        assert llm.info.step
        (output,) = llm.encode(text, use_tqdm=False)
    states, ids, weights = _states(folder, text)
    _close(output.outputs.data, _linear("score", states[ids == tag], weights).softmax(-1))


class PlainConfig(PreTrainedConfig):
    """A config of nothing but sizes: no padding token, no special tokens."""

    model_type = "lake-plain"
    vocab_size: int = 0
    hidden_size: int = HIDDEN
    num_hidden_layers: int = 0


class PlainModel(PreTrainedModel):
    """A table of vectors and one layer over them."""

    config_class = PlainConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, HIDDEN)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table."""
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """`[B, L] -> [B, L, D]`."""
        return BaseModelOutput(last_hidden_state=torch.tanh(self.layer(self.table(input_ids))))


def test_a_config_without_a_padding_token(tmp_path: Path) -> None:
    """A class of any base loads, although its config names no special token."""
    tokenizer = checkpoints.wordpiece()
    config = PlainConfig(vocab_size=len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        config.__dict__.pop(name, None)
    folder = checkpoints.save(PlainModel(config), tokenizer, tmp_path / "plain", seed=4)
    register_model(PlainModel)
    weights = load_file(folder / "model.safetensors")
    with LLM(model=str(folder), pooler_config={"pooling_type": "MEAN"}) as llm:
        outputs = llm.embed(TEXTS, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = tokenizer(text)["input_ids"]
        row = torch.tanh(_linear("layer", weights["table.weight"][ids], weights)).mean(0)
        _close(output.outputs.embedding, nn.functional.normalize(row, dim=-1))
