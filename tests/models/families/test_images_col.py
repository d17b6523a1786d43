"""Late interaction over pictures: rows and MaxSim of the models' own code, one input at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cenote import LLM
from cenote.errors import CheckpointError
from tests import pictured
from tests.pictured import COL_WIDTH, PAGE, PICTURE, QUERY_SUFFIX, noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from PIL.Image import Image

QUERIES = ["what is the revenue", "page " * 20, "figure in this chart"]
PAGES = [noise(90, 130), noise(300, 60), noise(64, 64), noise(340, 440), noise(90, 130)]
"""Pictures, of which the first comes twice."""
TOLERANCE = 2e-5
"""Largest difference of rows of length 1; measured: 1e-6."""


class ForRetrieval:
    """Transformers' own class and processor."""

    def __init__(self, name: str, folder: Path) -> None:
        processor = getattr(transformers, f"{name}Processor")
        self.processor = processor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        model = getattr(transformers, f"{name}ForRetrieval")
        self.model = model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def __call__(self, content: Any, *, mrope: bool = False) -> np.ndarray:
        if isinstance(content, str):
            inputs = self.processor.process_queries([content])
        else:
            inputs = self.processor.process_images([content])
        extra = {}
        if mrope and not isinstance(content, str):
            types = (inputs["input_ids"] == self.model.config.vlm_config.image_token_id).int()
            extra["position_ids"] = self.model.vlm.get_rope_index(
                inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=types
            )[0]
        with torch.inference_mode():
            return self.model(**inputs, **extra).embeddings[0].numpy()


class OfColQwen3:
    """The published code of a layout of ColQwen3, over Transformers' backbone."""

    def __init__(self, variant: str, folder: Path) -> None:
        plain = pictured.qwen_vl(folder.parent / f"plain-{variant}", "qwen3_vl")  # the same weights
        kind = pictured.processor_class("Qwen3VLProcessor")
        self.processor = kind.from_pretrained(plain, backend="pil", trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(plain)
        config.text_config.is_causal = variant != "nemotron"
        model = transformers.Qwen3VLModel.from_pretrained(
            plain, config=config, dtype=torch.float32, attn_implementation="eager"
        )
        if variant == "nemotron":
            model.language_model.norm = torch.nn.Identity()
        self.model = model.eval()
        self.weights = load_file(folder / "model.safetensors")
        self.variant = variant

    def text(self, content: Any) -> str:
        texts = {
            "tomoro": (f"{content}{QUERY_SUFFIX}", f"{PAGE}<|im_end|><|endoftext|>"),
            "ops": (f"Query: {content}{QUERY_SUFFIX}", f"{PAGE}<|im_end|><|im_start|>assistant\n<|endoftext|>"),
            "nemotron": (
                f"<|im_start|>user\nQuery: query: {content}<|im_end|>\n<|im_start|>assistant\n",
                f"<|im_start|>user\n{PICTURE}passage: <|im_end|>\n<|im_start|>assistant\n",
            ),
        }
        query, page = texts[self.variant]
        return query if isinstance(content, str) else page

    def rows(self, text: str, images: list[Image]) -> np.ndarray:
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**inputs, use_cache=False)[0][0]
        return self.projected(hidden)

    def projected(self, hidden: torch.Tensor) -> np.ndarray:
        if self.variant == "tomoro":
            weight, bias = self.weights["embedding_proj_layer.weight"], self.weights["embedding_proj_layer.bias"]
            hidden = torch.nn.functional.linear(hidden, weight, bias)
        if self.variant == "ops":
            weight, bias = self.weights["custom_text_proj.weight"], self.weights["custom_text_proj.bias"]
            hidden = torch.nn.functional.linear(hidden, weight, bias)[:, :COL_WIDTH]
        return torch.nn.functional.normalize(hidden, dim=-1).numpy()

    def __call__(self, content: Any) -> np.ndarray:
        return self.rows(self.text(content), [] if isinstance(content, str) else [content])


MAKERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "colqwen2": (pictured.colqwen2, lambda folder: ForRetrieval("ColQwen2", folder)),
    "colqwen2.5": (
        lambda folder: pictured.colqwen2(folder, "qwen2_5_vl"),
        lambda folder: ForRetrieval("ColQwen2", folder),
    ),
    "tomoro": (lambda folder: pictured.colqwen3(folder, "tomoro"), lambda folder: OfColQwen3("tomoro", folder)),
    "ops": (lambda folder: pictured.colqwen3(folder, "ops"), lambda folder: OfColQwen3("ops", folder)),
    "nemotron": (lambda folder: pictured.colqwen3(folder, "nemotron"), lambda folder: OfColQwen3("nemotron", folder)),
    "colpali": (pictured.colpali, lambda folder: ForRetrieval("ColPali", folder)),
}


class Case:
    """A checkpoint, loaded here, and the rows that are expected of each query and page."""

    def __init__(self, kind: str, folder: Path) -> None:
        make, reference = MAKERS[kind]
        self.kind = kind
        self.folder = make(folder)
        self.llm = LLM(str(self.folder))
        self.reference = reference(self.folder)
        self.expected = [self.reference(content) for content in (*QUERIES, *PAGES)]


def rows_of(llm: LLM, prompts: Any) -> list[np.ndarray]:
    outputs = llm.encode(prompts, use_tqdm=False, pooling_task="token_embed")
    return [output.outputs.data.numpy() for output in outputs]


def ids_of(llm: LLM, prompt: Any) -> list[int]:
    (output,) = llm.encode([prompt], use_tqdm=False, pooling_task="token_embed")
    return list(output.prompt_token_ids)


def maxsim(query: np.ndarray, page: np.ndarray) -> float:
    return float((query.astype(np.float64) @ page.astype(np.float64).T).max(1).sum())


@pytest.fixture(scope="module", params=[*MAKERS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = Case(request.param, tmp_path_factory.mktemp("col") / request.param.replace(".", "-"))
    yield made
    made.llm.close()


def test_rows_are_those_of_the_published_code_in_a_mixed_batch(case: Case) -> None:
    assert case.llm.info.report.layout == "packed"
    assert (case.llm.info.tasks[0], case.llm.info.score_types[0]) == ("token_embed", "late-interaction")
    inputs: list[Any] = [*QUERIES, *PAGES]
    order = np.random.default_rng(0).permutation(len(inputs))
    for own, i in zip(rows_of(case.llm, [inputs[i] for i in order]), order, strict=True):
        assert own.shape == case.expected[i].shape
        assert np.abs(own - case.expected[i]).max() < TOLERANCE
    other = rows_of(case.llm, [noise(90, 130, seed=1)])[0]
    assert other.shape == case.expected[len(QUERIES)].shape
    assert np.abs(other - case.expected[len(QUERIES)]).max() > 0.1, "another picture, other rows"


def test_scores_of_texts_are_maxsim_of_queries(case: Case) -> None:
    outputs = case.llm.score(QUERIES[0], QUERIES, use_tqdm=False)
    expected = [maxsim(case.expected[0], rows) for rows in case.expected[: len(QUERIES)]]
    assert [output.outputs.score for output in outputs] == pytest.approx(expected, abs=1e-4)
    ranked = case.llm.rerank(QUERIES[0], QUERIES, use_tqdm=False)
    assert [document.index for document in ranked] == np.argsort(-np.array(expected), kind="stable").tolist()


def test_maxsim_of_queries_and_pages(case: Case) -> None:
    own = rows_of(case.llm, [*QUERIES, *PAGES])
    queries, pages = own[: len(QUERIES)], own[len(QUERIES) :]
    for query, expected in zip(queries, case.expected, strict=False):
        for page, other in zip(pages, case.expected[len(QUERIES) :], strict=True):
            assert maxsim(query, page) == pytest.approx(maxsim(expected, other), abs=5e-5)


def test_a_query_that_is_cut_keeps_its_end(case: Case) -> None:
    whole = ids_of(case.llm, "page " * 60)
    (cut,) = case.llm.encode(
        ["page " * 60],
        use_tqdm=False,
        pooling_task="token_embed",
        tokenization_kwargs={"truncate_prompt_tokens": 30},
    )
    assert len(cut.prompt_token_ids) == 30
    assert cut.prompt_token_ids[-3:] == whole[-3:]


AUGMENTED = "<|endoftext|>" * 10
OF_QWEN2 = (f"Query: what is it{AUGMENTED}\n", f"{PAGE}<|im_end|><|endoftext|>")
RENDERED = {
    "colqwen2": OF_QWEN2,
    "colqwen2.5": OF_QWEN2,
    "tomoro": (f"what is it{AUGMENTED}", f"{PAGE}<|im_end|><|endoftext|>"),
    "ops": (f"Query: what is it{AUGMENTED}", f"{PAGE}<|im_end|><|im_start|>assistant\n<|endoftext|>"),
    "nemotron": (
        "<|im_start|>user\nQuery: query: what is it<|im_end|>\n<|im_start|>assistant\n",
        f"<|im_start|>user\n{PICTURE}passage: <|im_end|>\n<|im_start|>assistant\n",
    ),
    "colpali": ("<bos>Question: what is it" + "<pad>" * 10 + "\n", "<image><bos>Describe the image.\n"),
}
"""The templates of a query and of a page, literally."""


def test_a_query_and_a_page_are_rendered_by_the_template_of_the_family(case: Case) -> None:
    query, page = RENDERED[case.kind]
    tokenizer = case.llm.get_tokenizer()
    assert ids_of(case.llm, "what is it") == tokenizer(query, add_special_tokens=False)["input_ids"]
    prompt = {"prompt": page, "multi_modal_data": {"image": PAGES[0]}}
    assert ids_of(case.llm, PAGES[0]) == ids_of(case.llm, prompt)


USER = f"<|im_start|>user\n{PICTURE}{PICTURE}"
BESIDE = {
    "colqwen2": f"{USER}what is it<|im_end|><|endoftext|>",
    "colqwen2.5": f"{USER}what is it<|im_end|><|endoftext|>",
    "tomoro": f"{USER}Describe the image. what is it<|im_end|><|endoftext|>",
    "ops": f"{USER}what is it<|im_end|><|im_start|>assistant\n<|endoftext|>",
    "nemotron": f"{USER}passage: what is it<|im_end|>\n<|im_start|>assistant\n",
    "colpali": "<image><image><bos>what is it\n",
}


def test_the_text_of_a_page_stands_behind_its_pictures(case: Case) -> None:
    images, rendered = PAGES[2:4], BESIDE[case.kind]
    expected = ids_of(case.llm, {"prompt": rendered, "multi_modal_data": {"image": images}})
    for parts in ({"image": images, "text": "what is it"}, {"text": "what is it", "image": images}):
        assert ids_of(case.llm, parts) == expected
    assert ids_of(case.llm, {"text": "what is it"}) == ids_of(case.llm, "what is it")
    if isinstance(case.reference, OfColQwen3):
        (own,) = rows_of(case.llm, [{"image": images, "text": "what is it"}])
        assert np.abs(own - case.reference.rows(rendered, images)).max() < TOLERANCE


def test_positions_count_rows_and_columns_where_the_user_says_so(tmp_path: Path) -> None:
    """Row cosines between the two ways are down to 0.9: users of colpali-engine want theirs."""
    folder = pictured.colqwen2(tmp_path / "colqwen2")
    reference = ForRetrieval("ColQwen2", folder)
    with LLM(str(folder), hf_overrides={"image_positions": "mrope"}) as llm:
        assert llm.info.report.layout == "packed"
        rows = rows_of(llm, [*QUERIES, *PAGES])
    for own, content in zip(rows, (*QUERIES, *PAGES), strict=True):
        assert np.abs(own - reference(content, mrope=True)).max() < TOLERANCE
    assert np.abs(rows[-1] - reference(PAGES[-1])).max() > 0.01, "the two ways differ"
    with pytest.raises(CheckpointError, match="image_positions is 'square', expected one of flat, mrope"):
        LLM(str(folder), hf_overrides={"image_positions": "square"})


def test_prefixes_are_those_of_the_processor_files(tmp_path: Path) -> None:
    folder = pictured.colqwen2(tmp_path / "colqwen2")
    pictured.write(
        folder,
        "processor_config.json",
        {"query_prefix": "question ", "visual_prompt_prefix": f"{PICTURE}a page<|endoftext|>"},
    )
    reference = ForRetrieval("ColQwen2", folder)
    with LLM(str(folder)) as llm:
        for own, content in zip(rows_of(llm, [QUERIES[0], PAGES[0]]), (QUERIES[0], PAGES[0]), strict=True):
            assert own.shape == reference(content).shape
            assert np.abs(own - reference(content)).max() < TOLERANCE


def test_positions_of_colqwen3_may_be_flat(tmp_path: Path) -> None:
    folder = pictured.colqwen3(tmp_path / "tomoro", "tomoro")
    reference = OfColQwen3("tomoro", folder)
    with LLM(str(folder), hf_overrides={"image_positions": "flat"}) as llm:
        assert llm.info.report.layout == "packed"
        query, page = rows_of(llm, [QUERIES[0], PAGES[3]])
    assert np.abs(query - reference(QUERIES[0])).max() < TOLERANCE
    inputs = reference.processor(text=[reference.text(PAGES[3])], images=[PAGES[3]], return_tensors="pt")
    flat = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with torch.inference_mode():
        expected = reference.projected(reference.model(**inputs, position_ids=flat, use_cache=False)[0][0])
    assert np.abs(page - expected).max() < TOLERANCE
    assert np.abs(page - reference(PAGES[3])).max() > 0.01, "the two ways differ"


def test_a_projection_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = pictured.colqwen3(tmp_path / "ops", "ops")
    with pytest.raises(CheckpointError, match="dims in config.json is 0, expected a positive integer"):
        LLM(str(folder), hf_overrides={"dims": 0})
    tensors = load_file(folder / "model.safetensors")
    del tensors["custom_text_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"projects its rows by custom_text_proj\.weight, which is not there"):
        LLM(str(folder))
