"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures and texts to the vectors of Transformers, one input at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from cenote import LLM
from cenote.config import ModelConfig
from cenote.errors import BadRequest, TooLong
from cenote.models.families.qwen_vl import QwenVL
from cenote.models.load import load
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


def test_another_picture_leaves_its_neighbours_as_they_are(case: Case) -> None:
    """Bit by bit, as nothing but its content changes."""
    prompts = [prompt(*one) for one in INPUTS]
    before = case.encode(prompts)
    after = case.encode([*prompts[:4], prompt(PICTURE, [noise(90, 130, seed=7)]), *prompts[5:]])
    for i, (rows, others) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(rows, others) == (i != 4)


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
        (
            {"prompt": PICTURE, "multi_modal_data": {"image": A}, "mm_processor_kwargs": {"max_pixels": 1 << 40}},
            "lower",
        ),
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pictured.qwen_vl(tmp_path_factory.mktemp("qwen3") / "qwen3_vl", "qwen3_vl"))


@pytest.mark.parametrize(
    ("options", "layout"), [({"packing": False}, "padded"), ({"plain": True}, "packed"), ({"dtype": "auto"}, "packed")]
)
def test_every_way_to_run_gives_the_same_rows(folder: str, options: dict[str, Any], layout: str) -> None:
    reference = Reference(folder, "qwen3_vl")
    with LLM(folder, **options) as llm:
        assert llm.info.report.layout == layout
        outputs = llm.encode([prompt(*one) for one in INPUTS], pooling_task="token_embed", use_tqdm=False)
    for output, (text, images) in zip(outputs, INPUTS, strict=True):
        assert np.abs(output.outputs.data.numpy() - unit(reference.rows(text, images))).max() < TOLERANCE


def test_narrow_weights_leave_the_vision_tower_as_it_is(folder: str) -> None:
    exact = Reference(folder, "qwen3_vl")
    model, _ = load(ModelConfig(model=folder, quantization="int8"))
    vision = model.layout.backbone.model.visual
    for name, weights in exact.model.visual.named_parameters():
        assert torch.equal(vision.get_parameter(name), weights), name
    assert " in int8" in model.info.report.linears
    with LLM(folder, quantization="int8") as llm:
        outputs = llm.encode([prompt(*INPUTS[1])], pooling_task="token_embed", use_tqdm=False)
    cosines = (outputs[0].outputs.data.numpy() * unit(exact.rows(*INPUTS[1]))).sum(-1)
    assert 0.97 < cosines.min() < 0.99999


def test_a_deepstack_layer_that_is_the_last_runs_for_all_tokens(tmp_path: Path) -> None:
    """Features are added behind the first two layers: of two, the last cannot run for pooled tokens alone."""
    folder = str(pictured.qwen_vl(tmp_path / "shallow", "qwen3_vl", num_hidden_layers=2))
    model, _ = load(ModelConfig(model=folder))
    assert not model.layout.places  # type: ignore[union-attr]
    reference = Reference(folder, "qwen3_vl")
    with LLM(folder) as llm:
        outputs = llm.encode([prompt(*one) for one in INPUTS], pooling_task="embed", use_tqdm=False)
    for output, (text, images) in zip(outputs, INPUTS, strict=True):
        assert np.abs(output.outputs.data.numpy() - unit(reference.rows(text, images)[-1])).max() < TOLERANCE


def test_a_model_that_does_not_see_is_not_shown_pictures(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pictures do not move a row, they are refused, and texts are served."""
    monkeypatch.setattr(QwenVL, "alone", lambda self, sequence: torch.zeros(len(sequence), 64))
    with LLM(folder) as llm:
        with pytest.raises(BadRequest, match="could not be run with pictures"):
            llm.embed([A], use_tqdm=False)
        assert len(llm.embed(["a text"], use_tqdm=False)) == 1


def test_a_text_of_sentence_transformers_is_rendered_like_its_pictures(case: Case) -> None:
    text = "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n"
    assert case.ids({"text": "what is it"}) == case.ids(text)


def with_modules(folder: str, made: Path, output: Any) -> None:
    """Write the files of sentence-transformers around a copy of a checkpoint."""
    shutil.copytree(folder, made, dirs_exist_ok=True)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    way = {"method": "forward", "method_output_name": output}
    config = {
        "transformer_task": "feature-extraction",
        "modality_config": dict.fromkeys(("text", "image", "image+text"), way)
        | {"message": {**way, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    }
    (made / "1_Pooling").mkdir()
    pooling = {"embedding_dimension": 64, "pooling_mode": "lasttoken", "include_prompt": True}
    for name, content in (
        ("modules.json", modules),
        ("sentence_bert_config.json", config),
        ("1_Pooling/config.json", pooling),
        ("config_sentence_transformers.json", {"prompts": {"query": "find the page"}, "default_prompt_name": None}),
    ):
        pictured.write(made, name, content)


def test_a_folder_with_messages_renders_texts_and_pictures_by_its_template(folder: str, tmp_path: Path) -> None:
    """As sentence-transformers: the prompt is the system's message, and the template's variables are the files'."""
    with_modules(folder, tmp_path, "last_hidden_state")
    reference = Reference(folder, "qwen3_vl")
    begin = "<|im_start|>system\nfind the page<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    inputs: list[Any] = ["what is it", A, {"text": "what is it", "image": A}, {"image": [A, B], "text": "x"}]
    texts = ["what is it", PICTURE, f"what is it{PICTURE}", f"{PICTURE}{PICTURE}x"]
    images: list[list[Any]] = [[], [A], [A], [A, B]]
    with LLM(str(tmp_path)) as llm:
        outputs = llm.embed(inputs, prompt_name="query", use_tqdm=False)
    for output, text, pictures in zip(outputs, texts, images, strict=True):
        expected = reference.rows(begin + text + end, pictures)[-1]
        assert np.abs(np.array(output.outputs.embedding) - expected).max() < TOLERANCE * np.abs(expected).max()


def test_a_folder_with_messages_gives_the_vectors_of_sentence_transformers(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_modules(folder, tmp_path, "last_hidden_state")
    pictured.without_video(monkeypatch, "Qwen3VLProcessor")
    reference = SentenceTransformer(str(tmp_path), device="cpu")
    inputs: list[Any] = ["what is it", A, noise(90, 130, seed=1), {"text": "what is it", "image": A}]
    inputs.append({"image": A, "text": "what is it"})
    expected = np.array([reference.encode([one], prompt_name="query")[0] for one in inputs])
    with LLM(str(tmp_path)) as llm:
        outputs = llm.embed(inputs, prompt_name="query", use_tqdm=False)
    vectors = np.array([output.outputs.embedding for output in outputs])
    assert np.abs(vectors - expected).max() < TOLERANCE * np.abs(expected).max()
    assert min(np.abs(one - expected[1]).max() for one in expected[2:]) > 0.01, (
        "another picture or text, another vector"
    )
    assert np.abs(expected[3] - expected[4]).max() > 0.01, "another order, another vector"


def test_another_layer_is_read_of_pictures_too(folder: str, tmp_path: Path) -> None:
    with_modules(folder, tmp_path, ["hidden_states", -2])
    reference = Reference(folder, "qwen3_vl")
    text = f"<|im_start|>user\n{PICTURE}<|im_end|>\n<|im_start|>assistant\n"
    with torch.inference_mode():
        output = reference.model(**reference.inputs(text, [A]), use_cache=False, output_hidden_states=True)
    expected = output.hidden_states[-2][0, -1].numpy()
    with LLM(str(tmp_path)) as llm:
        (own,) = llm.embed([A], use_tqdm=False)
    assert np.abs(np.array(own.outputs.embedding) - expected).max() < TOLERANCE * np.abs(expected).max()
