"""Pictures: pages, short queries beside pages, pictures that come again, and pages whose processing dominates.

    python -m benchmarks.images [--rounds 5] [--pages 12] [--workloads mixed repeated pages decoding] [--save NAME]

The model has the shape of Qwen3-VL, random weights, 26 M parameters in its text part (8 layers of 512) and 10 M in its
tower (6 layers of 256); for "decoding" it is a tiny one. Others are Transformers' own model and processor, one input at
a time or in one padded batch, and Cenote without what is measured. Each runs in a process of its own, in turns, with
pictures that are new in each round; ratios are within a round. CPU time is that of one thread, wall that of two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness import Encode, Worker, row, save

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
WORDS = "the page query revenue report growth table chart figure number describe image what is shown who which year"
PROMPT = f"<|im_start|>user\n{PICTURE}{{}}<|im_end|><|endoftext|>"
QUESTION = "Describe the image."
MOST_PIXELS = 1280 * 32**2
TEXT: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 5e6, "mrope_interleaved": True,
    },
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 6, "hidden_size": 256, "out_hidden_size": 512, "num_heads": 4, "intermediate_size": 1024,
    "deepstack_visual_indexes": [1, 3], "num_position_embeddings": 2304, "patch_size": 16, "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}  # fmt: skip
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 5e6, "mrope_interleaved": True,
    },
}  # fmt: skip
TINY_VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip

Input = tuple[str, list[bytes]]
"""A prompt, and the files of its pictures."""
Order = list[list[Input]]
"""Calls, one after the other."""


def checkpoint(folder: Path, *, tiny: bool) -> str:
    """Write a checkpoint with random weights; return its path."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = write_tokenizer(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "merge_size": 2, "patch_size": 16, "temporal_patch_size": 2,
        "size": {"shortest_edge": 4 * 32**2, "longest_edge": MOST_PIXELS},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = Qwen3VLConfig(
        text_config={**TEXT, **(TINY_TEXT if tiny else {}), "vocab_size": 1024, "max_position_embeddings": 4096},
        vision_config={**VISION, **(TINY_VISION if tiny else {})},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a byte-level tokenizer; return the ids of its special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*[WORDS] * 3, *WORDS.split()], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **names).save_pretrained(folder)
    return {text: tokenizer.token_to_id(text) for text in SPECIAL}


def processor_of(folder: str) -> Any:
    """Return Transformers' processor without its part for videos, which needs torchvision."""
    from transformers import Qwen3VLProcessor

    class Processor(Qwen3VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    Processor.__name__ = "Qwen3VLProcessor"
    return Processor.from_pretrained(folder, backend="pil")


def cenote(folder: str, options: dict[str, Any], at_once: int = 0) -> Encode:
    """Cenote; `at_once` prompts with pictures are rendered before the model runs, by default as few as it takes."""
    from cenote import LLM, calls

    calls.PICTURED_AT_ONCE = at_once or calls.PICTURED_AT_ONCE
    llm = LLM(folder, **options)

    def encode(order: Order) -> np.ndarray:
        vectors = []
        for inputs in order:
            prompts = [{"prompt": text, "multi_modal_data": {"image": files}} for text, files in inputs]
            vectors += [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]
        return np.array(vectors)

    return encode


class Transformers:
    """Transformers' own processor and model.

    Args:
        folder: of the checkpoint.
        size: inputs of a padded batch.
    """

    def __init__(self, folder: str, size: int) -> None:
        from transformers import AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.processor = processor_of(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.size = size

    @torch.inference_mode()
    def __call__(self, order: Order) -> np.ndarray:
        vectors = [self.batch(inputs[i : i + self.size]) for inputs in order for i in range(0, len(inputs), self.size)]
        return np.concatenate(vectors)

    def batch(self, inputs: list[Input]) -> np.ndarray:
        """The normalised state of the last token of each."""
        from PIL import Image

        images = [Image.open(BytesIO(file)).convert("RGB") for _, files in inputs for file in files]
        texts = [text for text, _ in inputs]
        arguments = self.processor(
            text=texts, images=images or None, return_tensors="pt", padding=True, padding_side="right"
        )
        states = self.model(**arguments, use_cache=False)[0]
        lasts = arguments["attention_mask"].sum(1) - 1
        return torch.nn.functional.normalize(states[torch.arange(len(inputs)), lasts], dim=-1).numpy()


def page(generator: np.random.Generator, least: int, most: int) -> bytes:
    """The file of a page of text."""
    from PIL import Image, ImageDraw

    width, height = map(int, generator.integers(least, most + 1, 2))
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for y in range(10, height - 10, 14):
        draw.text((10, y), "".join(map(chr, generator.integers(97, 123, 80))), fill="black")
    form, options = ("JPEG", {"quality": 90}) if generator.integers(2) else ("PNG", {})
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def mixed(generator: np.random.Generator, pages: int) -> Order:
    """Short queries and small pages in one call."""
    queries: list[Input] = [(f"query {i} revenue of the year", []) for i in range(2 * pages)]
    shown: list[Input] = [(PROMPT.format(QUESTION), [page(generator, 224, 448)]) for _ in range(max(1, 2 * pages // 3))]
    inputs = [*queries, *shown]
    return [[inputs[i] for i in generator.permutation(len(inputs))]]


def repeated(generator: np.random.Generator, pages: int) -> Order:
    """A few pages, of which each call asks another question."""
    files = [page(generator, 224, 448) for _ in range(max(1, pages // 3))]
    questions = ("What is shown?", "Which year is it?", "Who wrote it?", "Is there a table?", "How many?", "And where?")
    return [[(PROMPT.format(question), [file]) for file in files] for question in questions]


def only_pages(generator: np.random.Generator, pages: int) -> Order:
    """Pages of any size in one call."""
    return [[(PROMPT.format(QUESTION), [page(generator, 224, 1024)]) for _ in range(pages)]]


def large_pages(generator: np.random.Generator, pages: int) -> Order:
    """Scans, for a model that has little to do with each."""
    return [[(PROMPT.format(QUESTION), [page(generator, 1500, 2200)]) for _ in range(pages)]]


class Workload(NamedTuple):
    """One measurement.

    Attributes:
        make: makes the inputs of a round, of a generator and a number of pages.
        goals: least ratio to each of the others; 0 = there is none.
        tiny: of a tiny model, with both threads, in wall time.
    """

    make: Any
    goals: dict[str, float]
    tiny: bool = False


WORKLOADS = {
    "mixed": Workload(mixed, {"one by one": 1.3, "one padded batch": 2.5}),
    "repeated": Workload(repeated, {"one by one": 2.0, "nothing kept": 0}),
    "pages": Workload(only_pages, {"one by one": 0.95}),
    "decoding": Workload(large_pages, {"one by one": 1.3, "all rendered before": 0}, tiny=True),
}
ALL = 1024
OTHERS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "cenote": (cenote, ({},)),
    "nothing kept": (cenote, ({"picture_cache_size": 0},)),
    "all rendered before": (cenote, ({}, ALL)),
    "one by one": (Transformers, (1,)),
    "one padded batch": (Transformers, (ALL,)),
}


def measure(name: str, folder: Path, rounds: int, pages: int) -> dict[str, Any]:
    """Return seconds of each round by engine, ratios to Cenote within a round, and the largest difference."""
    workload = WORKLOADS[name]
    path = checkpoint(folder / name, tiny=workload.tiny)
    threads = 2 if workload.tiny else 1
    engines = ["cenote", *workload.goals]
    workers = {engine: Worker(OTHERS[engine][0], path, *OTHERS[engine][1], threads=threads) for engine in engines}
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    difference = 0.0
    for number in range(-1, rounds):  # the first warms up
        order = workload.make(np.random.default_rng([number + 1, len(name)]), pages)
        vectors = {}
        for engine in engines if number % 2 else reversed(engines):
            cpu, wall, vectors[engine] = workers[engine].ask(order)
            if number >= 0:
                seconds[engine].append(wall if workload.tiny else cpu)
        difference = max(difference, *(float(np.abs(vectors["cenote"] - x).max()) for x in vectors.values()))
    for worker in workers.values():
        worker.stop()
    ratios = {
        engine: statistics.median(b / a for a, b in zip(seconds["cenote"], seconds[engine], strict=True))
        for engine in workload.goals
    }
    kind = "wall" if workload.tiny else "cpu"
    return {f"{kind}_seconds": seconds, "ratios": ratios, "goals": workload.goals, "largest_difference": difference}


def main() -> None:
    """Run and print; `--save` writes a JSON beside the earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pages", type=int, default=12, help="pages of a round; others in proportion")
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.workloads:
            results[name] = measure(name, Path(folder), options.rounds, options.pages)
            for engine, ratio in results[name]["ratios"].items():
                goal = WORKLOADS[name].goals[engine]
                row(f"{name}: {engine}, times the time of Cenote", f"{ratio:.2f} x", f">= {goal:g}" if goal else "")
            row(f"{name}: largest difference of a vector", f"{results[name]['largest_difference']:.1e}", "<= 2e-5")
    if options.save:
        chosen = " ".join(options.workloads)
        command = f"python -m benchmarks.images --rounds {options.rounds} --pages {options.pages} --workloads {chosen}"
        save(options.save, results, command)


if __name__ == "__main__":
    main()
