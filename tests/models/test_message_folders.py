"""Sentence-Transformers folders beyond single keys: messages, own poolers, older layouts, prompts of the config."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from cenote import LLM
from cenote.core import LateChunkingParams, PoolingParams
from cenote.errors import BadRequest, CheckpointError
from cenote.pipeline.options import TextOptions
from tests import checkpoints
from tests.checkpoints import HIDDEN, Module, dense, pooling

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["hello", "The quick brown fox jumps over the lazy dog.", "one two three four five six seven eight nine ten"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDENTITY = "torch.nn.modules.linear.Identity"


def embedded(llm: LLM, texts: list[str] = TEXTS, **options: Any) -> np.ndarray:
    outputs = llm.embed(texts, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1}, **options)
    return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


def chat_decoder(path: Path) -> Path:
    tokenizer = checkpoints.byte_level("$A", special=("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = CHAT
    return checkpoints.decoder(path, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a chat template, fine-tuned and saved by the installed release with no option but prompts."""
    source = chat_decoder(tmp_path_factory.mktemp("source"))
    path = tmp_path_factory.mktemp("saved")
    modules = [Transformer(str(source)), Pooling(HIDDEN, "lasttoken"), Normalize()]
    prompts = {"query": "find what answers: ", "document": ""}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(path))
    assert "message" in checkpoints.read_json(path / "sentence_bert_config.json")["modality_config"]
    return path


def test_texts_are_messages_and_prompts_are_the_system_s(chat: Path) -> None:
    model = SentenceTransformer(str(chat), device="cpu")
    with LLM(model=str(chat)) as llm:
        rows = embedded(llm)
        assert_close(rows, model.encode(TEXTS))
        assert_close(embedded(llm, input_type="query"), model.encode_query(TEXTS))
        assert_close(embedded(llm, prompt="be brief"), model.encode(TEXTS, prompt="be brief"))
        raw = [model.tokenizer(text)["input_ids"] for text in TEXTS]
        assert np.abs(embedded(llm, raw) - rows).max() > 0.1  # ids are taken as they are


@pytest.mark.parametrize("length", [12, 20, 30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_text_keeps_the_end_of_its_template(chat: Path, tmp_path: Path, length: int, side: str) -> None:
    folder = shutil.copytree(chat, tmp_path / "model")
    checkpoints.edit_json(
        folder / "sentence_bert_config.json",
        max_seq_length=length,
        processor_kwargs={"truncation_side": side},
        processing_kwargs={"chat_template": {"add_generation_prompt": True}},
    )
    model = SentenceTransformer(str(folder), device="cpu")
    with LLM(model=str(folder)) as llm:
        assert llm.info.max_model_len == length
        assert_close(embedded(llm), np.concatenate([model.encode([text]) for text in TEXTS]))
        assert_close(embedded(llm, input_type="query"), np.concatenate([model.encode_query([t]) for t in TEXTS]))


def test_a_conversation_is_rendered_once(chat: Path) -> None:
    with LLM(model=str(chat)) as llm:
        renderer = llm._service.renderer
        text = renderer.conversations.text([{"role": "user", "content": "hello"}])
        options = TextOptions(add_special_tokens=False)
        (once,) = renderer.render([text], "embed", PoolingParams(), options._replace(rendered=True))
        (as_text,) = renderer.render(["hello"], "embed", PoolingParams(), options)
        assert list(once.ids) == list(as_text.ids) == renderer.tokenize(text, add_special_tokens=False)
        with pytest.raises(BadRequest, match="renders texts by a chat template"):
            renderer.annotated(["hello"], "embed", PoolingParams())
        params = PoolingParams(late_chunking_params=LateChunkingParams(2))
        with pytest.raises(BadRequest, match="renders texts by a chat template"):
            llm.encode("hello", params, pooling_task="token_embed", use_tqdm=False)


def test_messages_without_a_template_are_refused(chat: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="modality_config names message, .* give one with --chat-template"):
        LLM(model=str(folder))


def test_an_expanded_query_is_no_message(chat: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat, tmp_path / "model")
    checkpoints.edit_json(folder / "sentence_bert_config.json", query_expansion={"strategy": "fixed", "length": 20})
    names = {"module_input_name": "token_embeddings"}
    listed = checkpoints.read_json(folder / "modules.json")[:1]
    listed.append({"idx": 1, "name": "1", "path": "2_Normalize", "type": checkpoints.NEW["Normalize"]})
    checkpoints.write_json(folder / "modules.json", listed)
    checkpoints.write_json(folder / "2_Normalize" / "config.json", names)
    checkpoints.edit_json(folder / "config_sentence_transformers.json", model_type="MultiVectorEncoder")
    with pytest.raises(CheckpointError, match="expanded with mask tokens and rendered by a chat template"):
        LLM(model=str(folder))


@pytest.mark.parametrize("steps", [(), (dense(HIDDEN, 20), checkpoints.NORMALIZE)], ids=["alone", "before modules"])
def test_the_model_s_own_pooler(tmp_path: Path, steps: tuple[Module, ...]) -> None:
    output = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
    transformer = {"modality_config": output, "module_output_name": "sentence_embedding"}
    folder = checkpoints.write_modules(checkpoints.bert(tmp_path), *steps, transformer=transformer)
    with LLM(model=str(folder)) as llm:
        assert llm.info.tasks == ("embed",)
        assert_close(embedded(llm), SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


@pytest.mark.parametrize("name", [["hidden_states", 9], "pooler_output"])
def test_an_output_that_the_model_does_not_have(tmp_path: Path, name: Any) -> None:
    folder = checkpoints.decoder(tmp_path)
    result = "sentence_embedding" if name == "pooler_output" else "token_embeddings"
    output = {"text": {"method": "forward", "method_output_name": name}}
    transformer = {"modality_config": output, "module_output_name": result}
    modules = () if name == "pooler_output" else (pooling("mean"),)
    checkpoints.write_modules(folder, *modules, transformer=transformer)
    with pytest.raises(CheckpointError, match="method_output_name"):
        LLM(model=str(folder))


@pytest.mark.parametrize("layer", [-3, -2, -1, 1])
def test_a_layer_of_a_decoder(tmp_path: Path, layer: int) -> None:
    output = {"text": {"method": "forward", "method_output_name": ["hidden_states", layer]}}
    transformer = {"modality_config": output, "module_output_name": "token_embeddings"}
    folder = checkpoints.write_modules(checkpoints.decoder(tmp_path), pooling("lasttoken"), transformer=transformer)
    with LLM(model=str(folder)) as llm:
        assert_close(embedded(llm), SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


def test_an_empty_config_leaves_the_next_name(tmp_path: Path) -> None:
    folder = checkpoints.write_modules(checkpoints.bert(tmp_path), pooling("mean"), transformer={})
    checkpoints.write_json(folder / "sentence_roberta_config.json", {"max_seq_length": 6})
    with LLM(model=str(folder)) as llm:
        assert llm.info.max_model_len == 6
        assert_close(embedded(llm), SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


def test_max_seq_length_replaces_the_tokenizer_s(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path, tokenizer=checkpoints.wordpiece(model_max_length=8))
    checkpoints.write_modules(folder, pooling("mean"), transformer={"max_seq_length": 40})
    with LLM(model=str(folder)) as llm:
        assert llm.info.max_model_len == 40
        assert_close(embedded(llm), SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


@pytest.mark.parametrize("length", [8, 20])
def test_a_prompt_that_fills_the_window(tmp_path: Path, length: int) -> None:
    """What is left of it is not pooled; of a window that it fills, the closing special token is."""
    settings = {"prompts": {"q": "one two three four five six seven eight nine ten "}, "default_prompt_name": "q"}
    folder = checkpoints.bert(tmp_path)
    transformer = {"max_seq_length": length}
    checkpoints.write_modules(folder, pooling("mean", include_prompt=False), transformer=transformer, settings=settings)
    with LLM(model=str(folder)) as llm:
        rows = embedded(llm)
    assert np.linalg.norm(rows, axis=-1).min() > 0.1
    assert_close(rows, SentenceTransformer(str(folder), device="cpu").encode(TEXTS))


@pytest.mark.parametrize("prompts", [{}, {"query": "", "document": ""}], ids=["none", "empty"])
def test_task_instructions_of_the_config(tmp_path: Path, prompts: dict[str, str]) -> None:
    folder = checkpoints.bert(tmp_path)
    instructions = {"query": "find what answers: ", "document": "a passage: "}
    checkpoints.edit_json(folder / "config.json", task_instructions=instructions)
    checkpoints.write_modules(folder, pooling("mean"), settings={"prompts": prompts})
    model = SentenceTransformer(str(folder), device="cpu")
    with LLM(model=str(folder)) as llm:
        for side, text in instructions.items():
            assert_close(embedded(llm, input_type=side), model.encode(TEXTS, prompt=text))


def test_prompts_of_the_folder_come_before_task_instructions(tmp_path: Path) -> None:
    folder = checkpoints.bert(tmp_path)
    checkpoints.edit_json(folder / "config.json", task_instructions={"query": "other "})
    checkpoints.write_modules(folder, pooling("mean"), settings={"prompts": {"query": "find "}})
    model = SentenceTransformer(str(folder), device="cpu")
    with LLM(model=str(folder)) as llm:
        assert_close(embedded(llm, input_type="query"), model.encode_query(TEXTS))


ACTIVATIONS = ["Identity", "Sigmoid", "Softmax", "Tanh", "ReLU", "GELU", "LogSoftmax"]
PLACES = ["sentence_transformers", "sbert_ce_default_activation_function"]
PLACED = [
    pytest.param(place, kind, labels, id=f"{place}-{kind}-{labels}")
    for place in PLACES
    for kind in ACTIVATIONS
    for labels in (1, 3)
]


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")  # of torch, in the reference
@pytest.mark.parametrize(("place", "kind", "labels"), PLACED)
def test_activation_in_the_config_of_older_releases(tmp_path: Path, labels: int, kind: str, place: str) -> None:
    folder = checkpoints.classifier(tmp_path, num_labels=labels)
    path = "torch.nn.modules.linear.Identity" if kind == "Identity" else f"torch.nn.modules.activation.{kind}"
    value: Any = {"activation_fn": path} if place == "sentence_transformers" else path
    checkpoints.edit_json(folder / "config.json", **{place: value})
    pair = (TEXTS[2], TEXTS[1])
    expected = np.atleast_1d(CrossEncoder(str(folder), device="cpu").predict(pair))
    with LLM(model=str(folder)) as llm:
        (output,) = llm.classify([{"text": pair[0], "text_pair": pair[1]}], use_tqdm=False)
        assert_close(np.array(output.outputs.probs), expected)
        if labels == 1:
            assert_close(np.array([llm.score(*pair, use_tqdm=False)[0].outputs.score]), expected)


@pytest.mark.parametrize(
    "overrides", [None, {"architectures": ["ColBERTModernBertModel"]}], ids=["plain", "overridden"]
)
def test_pylate_before_sentence_transformers_5(tmp_path: Path, overrides: dict[str, Any] | None) -> None:
    """As GTE-ModernColBERT-v1 was published: no `model_type`, and PyLate's Dense."""
    folder = checkpoints.bert(tmp_path / "model")
    settings = {
        "__version__": {"sentence_transformers": "4.1.0", "transformers": "4.48.2", "pytorch": "2.6.0"},
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": 16,
        "document_length": 30,
        "attend_to_expansion_tokens": False,
        "skiplist_words": [".", ","],
    }
    projection = dense(HIDDEN, 16, bias=False, activation=IDENTITY)
    transformer = {"max_seq_length": 30, "do_lower_case": False}
    checkpoints.write_modules(folder, projection, new=False, transformer=transformer, settings=settings)
    listed = checkpoints.read_json(folder / "modules.json")
    listed[1]["type"] = "pylate.models.Dense.Dense"
    checkpoints.write_json(folder / "modules.json", listed)
    typed = shutil.copytree(folder, tmp_path / "typed")
    checkpoints.edit_json(typed / "config_sentence_transformers.json", model_type="ColBERT")
    model = MultiVectorEncoder(str(typed), device="cpu")
    expected = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS)).numpy()
    with LLM(model=str(folder), hf_overrides=overrides) as llm:
        for query, row in zip(TEXTS, expected, strict=True):
            scores = [output.outputs.score for output in llm.score(query, TEXTS, use_tqdm=False)]
            np.testing.assert_allclose(scores, row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["XLMRobertaLoRA", "BertModel"])
def test_own_code_of_one_checkpoint_is_known(tmp_path: Path, architecture: str) -> None:
    """That of jina-embeddings-v3 chooses adapters, as prompts do here; any other `custom_st` is refused."""
    folder = checkpoints.write_modules(checkpoints.bert(tmp_path), pooling("mean"))
    listed = checkpoints.read_json(folder / "modules.json")
    listed[0]["type"] = "custom_st.Transformer"
    checkpoints.write_json(folder / "modules.json", listed)
    checkpoints.edit_json(folder / "config.json", architectures=[architecture])
    if architecture == "BertModel":
        with pytest.raises(CheckpointError, match=r"custom_st\.Transformer, which is code of the checkpoint itself"):
            LLM(model=str(folder), trust_remote_code=True)
        return
    with LLM(model=str(folder)) as llm:
        assert "embed" in llm.info.tasks
