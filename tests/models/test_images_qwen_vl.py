"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures and texts to the vectors of Transformers, one input at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from cenote import LLM
from cenote.errors import BadRequest, TooLong
from tests import pictured
from tests.pictured import PICTURE, noise, saved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

A, B, C, D = noise(90, 130), noise(300, 60), noise(64, 64), noise(40, 400)
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
INPUTS: list[tuple[str, list[Any]]] = [
    ("what is in this page", []),
    (f"{PICTURE}describe the image", [A]),
    (f"q {PICTURE} and {PICTURE} compare {PICTURE}", [B, C, D]),
    ("a much longer query " * 9, []),
    (PICTURE, [A]),
    (f"x {PICTURE}{PICTURE}", [A, A]),
    (PICTURE, [B]),
    ("y", []),
]
TOLERANCE = 2e-5
"""Largest difference of token rows, whose mean size is 0.8; measured: 4.1e-6."""


class Reference:
    """Transformers' own model and processor, without video."""

    def __init__(self, folder: str, kind: str) -> None:
        name = PROCESSORS[kind]
        self.processor = pictured.processor_class(name).from_pretrained(folder, backend="pil", trust_remote_code=False)
        model = getattr(transformers, pictured.GENERATORS[kind])
        full = model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model = full.model.eval()

    def inputs(self, text: str, images: list[Image]) -> Any:
        return self.processor(text=[text], images=images or None, return_tensors="pt")

    def rows(self, text: str, images: list[Image]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(**self.inputs(text, images), use_cache=False)[0][0].numpy()


class Case:
    """A checkpoint, loaded here and by Transformers."""

    def __init__(self, kind: str, folder: str) -> None:
        self.kind = kind
        self.llm = LLM(folder)
        self.reference = Reference(folder, kind)

    def encode(self, prompts: Any, task: str = "token_embed", **options: Any) -> list[np.ndarray]:
        params = {"use_tqdm": False, "pooling_task": task, **options}
        return [output.outputs.data.numpy() for output in self.llm.encode(prompts, **params)]

    def ids(self, prompt: Any) -> list[int]:
        (output,) = self.llm.embed([prompt], use_tqdm=False)
        return list(output.prompt_token_ids)


def prompt(text: str, images: list[Any]) -> Any:
    return {"prompt": text, "multi_modal_data": {"image": images}} if images else text


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="module", params=[*PROCESSORS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = pictured.qwen_vl(tmp_path_factory.mktemp("qwen") / request.param, request.param)
    made = Case(request.param, str(folder))
    yield made
    made.llm.close()


def test_rows_are_those_of_transformers_one_input_at_a_time(case: Case) -> None:
    assert case.llm.info.report.layout == "packed"
    assert case.llm.info.report.shares_prefixes
    rows = case.encode([prompt(*one) for one in INPUTS])
    for own, (text, images) in zip(rows, INPUTS, strict=True):
        expected = unit(case.reference.rows(text, images))
        assert own.shape == expected.shape
        assert np.abs(own - expected).max() < TOLERANCE
    assert np.abs(rows[4] - rows[6][: len(rows[4])]).max() > 0.1, "another picture, other rows"


def test_vectors_are_the_last_rows_in_any_company(case: Case) -> None:
    together = case.encode([prompt(*one) for one in INPUTS], "embed")
    for own, (text, images) in zip(together, INPUTS, strict=True):
        (alone,) = case.encode([prompt(text, images)], "embed")
        assert np.abs(own - unit(case.reference.rows(text, images)[-1])).max() < TOLERANCE
        assert np.abs(own - alone).max() < TOLERANCE


def test_ids_are_those_of_the_processor(case: Case) -> None:
    for text, images in INPUTS:
        assert case.ids(prompt(text, images)) == case.reference.inputs(text, images)["input_ids"][0].tolist()


def test_pages_of_the_same_ids_are_told_apart(case: Case) -> None:
    """By ids alone, the beginning of the second page would be that of the first: wrong by 3.8."""
    text = "a page of a long report with a table and a figure " * 2 + PICTURE + "what is in this page"
    pages = [noise(64, 64, seed) for seed in range(3)]
    rows = case.encode([prompt(text, [page]) for page in pages])
    for own, page in zip(rows, pages, strict=True):
        assert np.abs(own - unit(case.reference.rows(text, [page]))).max() < TOLERANCE


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_files_are_as_good_as_pictures(case: Case, form: str, tmp_path: Any) -> None:
    file = saved(A, form, lossless=True) if form == "WEBP" else saved(A, form)
    path = tmp_path / "a.file"
    path.write_bytes(file)
    expected, *others = case.encode([prompt(PICTURE, [source]) for source in (A, file, path, str(path))], "embed")
    assert all(np.abs(own - expected).max() < 1e-6 for own in others)


def test_a_picture_alone_is_rendered_by_the_chat_template(case: Case) -> None:
    text = f"<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n"
    own, beside = case.encode([A, {"image": A, "text": "what is it"}], "embed")
    assert np.abs(own - unit(case.reference.rows(text, [A])[-1])).max() < TOLERANCE
    text = text.replace("<|im_end|>", "what is it<|im_end|>")
    assert np.abs(beside - unit(case.reference.rows(text, [A])[-1])).max() < TOLERANCE


def test_pictures_are_shrunk_as_asked(case: Case) -> None:
    side = 2 * pictured.VISION[case.kind]["patch_size"]
    large = noise(20 * side, 10 * side)
    whole = {"prompt": PICTURE, "multi_modal_data": {"image": large}}
    assert len(case.ids(whole)) - 2 > 9
    for kwargs in ({"max_pixels": 9 * side**2}, {"size": {"longest_edge": 9 * side**2}}, {"image_size": 4 * side}):
        assert len(case.ids({**whole, "mm_processor_kwargs": kwargs})) - 2 <= 9
    size = {"shortest_edge": 4 * side**2, "longest_edge": 9 * side**2}
    inputs = case.reference.processor(text=[PICTURE], images=[large], size=size, return_tensors="pt")
    with torch.inference_mode():
        expected = unit(case.reference.model(**inputs, use_cache=False)[0][0].numpy())
    (own,) = case.encode([{**whole, "mm_processor_kwargs": {"max_pixels": 9 * side**2}}])
    assert np.abs(own - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "no place", "multi_modal_data": {"image": A}}, "0 image placeholders for 1 images"),
        ({"text": f"look {PICTURE}", "image": A}, "2 image placeholders for 1 images"),
        ({"prompt": PICTURE, "multi_modal_data": {"video": A}}, "only `image`"),
        ({"prompt": PICTURE, "multi_modal_data": {"image": b"no picture"}}, "cannot be read"),
        ({"prompt": PICTURE * 17, "multi_modal_data": {"image": [A] * 17}}, "At most 16 image"),
        ({"prompt": PICTURE, "multi_modal_data": {"image": A}, "mm_processor_kwargs": {"max_pixels": 1 << 40}}, "lower"),
        ({"prompt": PICTURE, "multi_modal_data": {"image": A}, "mm_processor_kwargs": {"patch_size": 7}}, "patch_size"),
    ],
)
def test_refusals(case: Case, wrong: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        case.encode([wrong])


def test_a_picture_is_never_cut(case: Case) -> None:
    text = {"prompt": f"{PICTURE} a long text behind it", "multi_modal_data": {"image": C}}
    length = len(case.ids(text))
    options = {"truncate_prompt_tokens": length - 3}
    (cut,) = case.encode([text], tokenization_kwargs={**options, "truncation_side": "right"})
    (whole,) = case.encode([text])
    assert np.abs(cut - whole[: length - 3]).max() < TOLERANCE
    with pytest.raises(TooLong, match="would cut a picture"):
        case.encode([text], tokenization_kwargs={**options, "truncation_side": "left"})
