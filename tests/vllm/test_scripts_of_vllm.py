"""Scripts in the form of vLLM's offline examples, run from end to end with `cenote` in place of `vllm`.

Each parses a command line by `EngineArgs` and `FlexibleArgumentParser`, makes an `LLM` of all arguments, and prints.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import requests
import torch
import transformers

import cenote
from cenote import LLM, EngineArgs, LoRARequest, PoolerConfig, PoolingParams, config, settings
from cenote.cli.engine_args import FlexibleArgumentParser
from cenote.foreign import FOREIGN
from cenote.settings import resolve
from tests import PATIENCE, checkpoints, forked, pictured
from tests.models.test_peft import trained
from tests.server.test_process import Process

HEAD = """
import json
from vllm import LLM, EngineArgs, PoolingParams
from vllm.config import PoolerConfig
from vllm.utils.argparse_utils import FlexibleArgumentParser

def parse(**defaults):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description="an example"))
    parser.set_defaults(runner="pooling", enforce_eager=True, **defaults)
    return parser.parse_args()

args = parse({defaults})
"""
PROMPTS = ["Hello, my name is", "The capital of France is Paris"]
RERANKER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["a", "b"],
    "method": "from_2_way_softmax",
}
TEMPLATE = (
    "{{ (messages | selectattr('role', 'eq', 'query') | first).content }} "
    "{{ (messages | selectattr('role', 'eq', 'document') | first).content }}"
)
BODIES: dict[str, tuple[str, str]] = {
    "embed": (
        'model="intfloat/e5-small"',
        """
outputs = LLM(**vars(args)).embed(PROMPTS)
result = [output.outputs.embedding for output in outputs]
""",
    ),
    "matryoshka": (
        'model="intfloat/e5-small", hf_overrides={"is_matryoshka": True}, trust_remote_code=True',
        """
outputs = LLM(**vars(args)).embed(PROMPTS, pooling_params=PoolingParams(dimensions=8))
result = [output.outputs.embedding for output in outputs]
""",
    ),
    "classify": (
        'model="jason9693/apeach"',
        """
outputs = LLM(**vars(args)).classify(PROMPTS)
result = [output.outputs.probs for output in outputs]
""",
    ),
    "score": (
        'model="BAAI/bge-reranker"',
        """
outputs = LLM(**vars(args)).score(PROMPTS[0], PROMPTS)
result = [output.outputs.score for output in outputs]
""",
    ),
    "template": (
        'model="Qwen/reranker"',
        """
args.hf_overrides = RERANKER
outputs = LLM(**vars(args)).score(PROMPTS[0], PROMPTS, chat_template=TEMPLATE)
result = [output.outputs.score for output in outputs]
""",
    ),
    "reward of a sequence": (
        'model="Skywork/reward", max_model_len=64',
        """
from vllm.utils.print_utils import print_embeddings
outputs = LLM(**vars(args)).encode(PROMPTS, pooling_task="classify")
result = [output.outputs.data.tolist() for output in outputs]
print_embeddings(result[0], prefix="Reward")
""",
    ),
    "reward of tokens": (
        'model="internlm/reward", max_model_len=64',
        """
outputs = LLM(**vars(args)).encode(PROMPTS, pooling_task="token_classify")
result = [output.outputs.data.tolist() for output in outputs]
""",
    ),
    "several vectors": (
        'model="intfloat/e5-small", pooler_config=PoolerConfig(task="token_embed")',
        """
llm = LLM(**vars(args))
outputs = llm.encode(PROMPTS, pooling_task="token_embed")
result = [output.outputs.data.tolist() for output in outputs]
result.append([output.outputs.score for output in llm.score(PROMPTS[0], PROMPTS)])
""",
    ),
    "late chunking": (
        'model="intfloat/e5-small", pooler_config=PoolerConfig(task="token_embed")',
        """
from vllm.pooling_params import LateChunkingParams
late = PoolingParams(late_chunking_params=LateChunkingParams(chunk_size=4))
outputs = LLM(**vars(args)).encode(PROMPTS, pooling_task="token_embed", pooling_params=late)
result = [[output.outputs.data.tolist(), [chunk.token_range for chunk in output.late_chunking.chunks]]
          for output in outputs]
""",
    ),
    "entities": (
        'model="boltuix/ner", trust_remote_code=True',
        """
llm = LLM(**vars(args))
tokenizer = llm.get_tokenizer()
names = llm.llm_engine.vllm_config.model_config.hf_config.id2label
(output,) = llm.encode(PROMPTS[:1], pooling_task="token_classify")
tokens = tokenizer.convert_ids_to_tokens(output.prompt_token_ids)
result = [[token, names[place.item()]] for token, place in zip(tokens, output.outputs.data.argmax(dim=-1))]
""",
    ),
    "adapter": (
        'model="intfloat/e5-small", enable_lora=True, max_lora_rank=8',
        """
from vllm.lora.request import LoRARequest
outputs = LLM(**vars(args)).embed(PROMPTS, lora_request=LoRARequest("trained", 1, "adapter"))
result = [output.outputs.embedding for output in outputs]
""",
    ),
}
"""Defaults of each script's arguments, and what it does with them."""
TAIL = "\nprint(json.dumps(result))\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints below the names that the scripts use."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("intfloat", "jason9693", "BAAI", "Qwen", "Skywork", "internlm", "boltuix"):
        (folder / name).mkdir()
    base = checkpoints.bert(folder / "intfloat/e5-small")
    with warnings.catch_warnings(action="ignore"):  # peft's own, on Transformers
        trained(transformers.AutoModel.from_pretrained(base), folder / "adapter", target_modules=["query", "value"])
    checkpoints.classifier(folder / "jason9693/apeach", num_labels=3)
    checkpoints.classifier(folder / "BAAI/bge-reranker", num_labels=1)
    checkpoints.decoder(folder / "Qwen/reranker")
    checkpoints.classifier(folder / "Skywork/reward", "Qwen3", num_labels=1, tokenizer=checkpoints.byte_level())
    rated = checkpoints.decoder(folder / "internlm/reward")
    checkpoints.add_head(rated, "Qwen2ForRewardModel", checkpoints.two_layers(1))
    checkpoints.classifier(folder / "boltuix/ner", head="ForTokenClassification", num_labels=3)
    return folder


def script(name: str) -> str:
    """The script of that name, for Cenote."""
    defaults, body = BODIES[name]
    constants = f"PROMPTS = {PROMPTS!r}\nRERANKER = {RERANKER!r}\nTEMPLATE = {TEMPLATE!r}\n"
    return re.sub(r"\bvllm\b", "cenote", constants + HEAD.replace("{defaults}", defaults) + body + TAIL)


SCRIPTS: dict[str, Callable[[], Any]] = {
    "embed": lambda: embeddings(LLM("intfloat/e5-small").embed(PROMPTS)),
    "matryoshka": lambda: embeddings(
        LLM("intfloat/e5-small", hf_overrides={"is_matryoshka": True}).embed(
            PROMPTS, pooling_params=PoolingParams(dimensions=8)
        )
    ),
    "classify": lambda: [output.outputs.probs for output in LLM("jason9693/apeach").classify(PROMPTS)],
    "score": lambda: scores(LLM("BAAI/bge-reranker").score(PROMPTS[0], PROMPTS)),
    "template": lambda: scores(
        LLM("Qwen/reranker", hf_overrides=RERANKER).score(PROMPTS[0], PROMPTS, chat_template=TEMPLATE)
    ),
    "reward of a sequence": lambda: data(LLM("Skywork/reward").encode(PROMPTS, pooling_task="classify")),
    "reward of tokens": lambda: data(LLM("internlm/reward").reward(PROMPTS)),
    "several vectors": lambda: several_vectors(LLM("intfloat/e5-small")),
    "late chunking": lambda: chunks(LLM("intfloat/e5-small")),
    "entities": lambda: entities(LLM("boltuix/ner")),
    "adapter": lambda: embeddings(
        LLM("intfloat/e5-small", lora_modules=["trained=adapter"]).embed(
            PROMPTS, lora_request=LoRARequest("trained", 1, "adapter")
        )
    ),
}
"""The same results by calls of `LLM`, without a command line."""


def embeddings(outputs: Any) -> list[list[float]]:
    return [output.outputs.embedding for output in outputs]


def scores(outputs: Any) -> list[float]:
    return [output.outputs.score for output in outputs]


def data(outputs: Any) -> list[Any]:
    return [output.outputs.data.tolist() for output in outputs]


def several_vectors(llm: LLM) -> list[Any]:
    rows = data(llm.encode(PROMPTS, pooling_task="token_embed"))
    return [*rows, scores(llm.score(PROMPTS[0], PROMPTS, score_type="late-interaction"))]


def chunks(llm: LLM) -> list[Any]:
    """Rows by the definition, the mean of a chunk's rows, normalised, and their ranges."""
    outputs = llm.encode(PROMPTS, PoolingParams(use_activation=False), pooling_task="token_embed")
    found = []
    for output in outputs:
        rows = output.outputs.data.split(4)
        means = [torch.nn.functional.normalize(part.mean(dim=0), dim=0).tolist() for part in rows]
        count = len(output.prompt_token_ids)
        found.append([means, [[start, min(start + 4, count)] for start in range(0, count, 4)]])
    return found


def entities(llm: LLM) -> list[list[str]]:
    (output,) = llm.encode(PROMPTS[:1], pooling_task="token_classify")
    tokens = llm.get_tokenizer().convert_ids_to_tokens(output.prompt_token_ids)
    places = output.outputs.data.argmax(dim=-1).tolist()
    return [[token, f"LABEL_{place}"] for token, place in zip(tokens, places, strict=True)]


def assert_close(found: Any, expected: Any) -> None:
    """Nested lists of numbers and texts are the same, but for rounding."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert found == expected


@pytest.mark.parametrize("name", BODIES)
def test_scripts(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "script.py"
    file.write_text(script(name))
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", [str(file), "--max_num_seqs", "8", "-tp", "1", "--no-enable-prefix-caching"])
    runpy.run_path(str(file), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert_close(json.loads(lines[-1]), SCRIPTS[name]())
    if "print_embeddings" in BODIES[name][1]:
        assert re.fullmatch(r"Reward: \[-?[\d.e-]+\] \(size=1\)", lines[-2])


@pytest.mark.full
def test_a_script_is_a_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test's process is needed, and flags overrule the script's defaults."""
    monkeypatch.chdir(home)
    done = forked.run(script("embed"), "--model=boltuix/ner", "--pooler_config.seq_pooling_type", "CLS")
    expected = LLM(str(home / "boltuix/ner"), pooler_config={"pooling_type": "CLS"}).embed(PROMPTS)
    assert done.returncode == 0, done.stderr
    assert_close(json.loads(done.stdout.splitlines()[-1]), embeddings(expected))


def test_pictures(tmp_path: Path) -> None:
    """As the examples of pictures do: engine arguments as a mapping, and a picture out of a URL."""
    multimodal: Any = import_module("cenote.multimodal.utils")
    prompt = import_module("cenote.inputs").TextPrompt
    image = pictured.noise(32, 48)
    fetched = multimodal.fetch_image(multimodal.encode_image_url(image))
    assert np.array_equal(np.asarray(fetched), np.asarray(image.convert("RGB")))
    folder = pictured.qwen_vl(tmp_path / "Qwen3-VL-Embedding-2B", "qwen3_vl")
    arguments = EngineArgs(model=str(folder), runner="pooling", max_model_len=200, limit_mm_per_prompt={"image": 1})
    llm = LLM(**asdict(arguments))
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    (output,) = llm.embed(prompt(prompt=text, multi_modal_data={"image": fetched}))
    (expected,) = LLM(str(folder)).embed({"prompt": text, "multi_modal_data": {"image": image}})
    assert_close(output.outputs.embedding, expected.outputs.embedding)
    assert llm.info.max_model_len == 200


# --- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_are_those_of_llm() -> None:
    """Unset ones change nothing: the configs are those of `LLM` without arguments, and nothing is told."""
    layers = (config.ModelConfig, config.EngineConfig)
    configs, notes = resolve(asdict(EngineArgs()), layers)
    assert configs == resolve(settings.OFFLINE, layers)[0]
    assert notes == []
    names = {entry.name for entry in fields(EngineArgs)}
    assert names == {*settings.known_options(layers), *FOREIGN}
    with pytest.raises(TypeError, match="max_model_length"):
        EngineArgs(max_model_length=3)


def parsed(*argv: str, **defaults: Any) -> argparse.Namespace:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--chunk_size", "-c", type=int, default=3)
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def test_flags_are_those_of_the_command_line() -> None:
    args = parsed(
        *["--max_model_len", "4k", "--prompts=5", "--chunk_size", "7", "-O3", "--hf-overrides.a.b", "[1]"],
        *["--served-model-name", "x", "y", "-q", "int8", "--no-enable_prefix_caching", "--trust_remote_code"],
        model="m",
    )
    assert (args.model, args.max_model_len, args.prompts, args.chunk_size) == ("m", 4000, 5, 7)
    assert (args.max_num_seqs, args.optimization_level, args.enable_prefix_caching) == (256, "3", False)
    arguments = EngineArgs.from_cli_args(args)
    assert (arguments.model, arguments.served_model_name, arguments.quantization) == ("m", ["x", "y"], "int8")
    assert arguments.trust_remote_code is True
    (model, engine), notes = resolve({**asdict(arguments), "prompts": None}, (config.ModelConfig, config.EngineConfig))
    assert isinstance(model, config.ModelConfig)
    assert isinstance(engine, config.EngineConfig)
    assert (model.hf_overrides, model.max_model_len) == ({"a": {"b": [1]}}, 4000)
    assert engine.forward_timeout == 0
    assert [note.split()[0] for note in notes] == ["enable_prefix_caching", "optimization_level"]


@pytest.mark.parametrize("length", ["auto", "-1"])
def test_words_for_lengths(length: str) -> None:
    args = parsed("--max-model-len", length)
    model = resolve({"max_model_len": args.max_model_len}, (config.ModelConfig,))[0][0]
    assert model == config.ModelConfig()


def test_an_unknown_flag_ends_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--max-model-length", "3")
    assert "unrecognized arguments: --max-model-length" in capsys.readouterr().err


def test_parameters_without_effect() -> None:
    params = PoolingParams(skip_reading_prefix_cache=True, requires_token_ids=False)
    assert params == PoolingParams()
    assert params.given() == []


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("engine.arg_utils", "EngineArgs", EngineArgs),
        ("utils", "FlexibleArgumentParser", FlexibleArgumentParser),
        ("pooling_params", "PoolingParams", PoolingParams),
        ("config", "PoolerConfig", PoolerConfig),
        ("outputs", "ScoringRequestOutput", cenote.ScoringRequestOutput),
        ("plugins.io_processors.interface", "IOProcessor", cenote.IOProcessor),
        ("transformers_utils.repo_utils", "hf_api", huggingface_hub.HfApi),
    ],
)
def test_names_are_where_scripts_look(module: str, name: str, home: type) -> None:
    assert getattr(import_module(f"cenote.{module}"), name) is home


def test_pairs_with_pictures_are_mappings() -> None:
    for path in ("entrypoints.score_utils", "entrypoints.pooling.score.utils"):
        param = import_module(f"cenote.{path}").ScoreMultiModalParam
        assert param(content=[{"type": "text", "text": "a"}]) == {"content": [{"type": "text", "text": "a"}]}


def test_one_platform() -> None:
    platform = import_module("cenote.platforms").current_platform
    assert [platform.is_cpu(), platform.is_cuda() or platform.is_rocm()] in ([True, False], [False, True])


# --- a server ------------------------------------------------------------------------------------------------------


def test_bytes_of_a_server(home: Path) -> None:
    """The client side of answers in bytes and base64, in every dtype and order, against a real server."""
    serial: Any = import_module("cenote.utils.serial_utils")
    server = Process(str(home / "intfloat/e5-small"))
    try:
        expected = torch.tensor(server.embed(PROMPTS))
        for dtype, order in itertools.product(serial.EMBED_DTYPE_TO_TORCH_DTYPE, serial.ENDIANNESS):
            body = {"input": PROMPTS, "embed_dtype": dtype, "endianness": order}
            rounded = expected.to(serial.EMBED_DTYPES[dtype]).float()
            answer = post(server, {**body, "encoding_format": "bytes"})
            items = [serial.MetadataItem(**item) for item in json.loads(answer.headers["metadata"])["data"]]
            assert torch.equal(stacked(serial.decode_pooling_output(items[::-1], answer.content)), rounded)
            answer = post(server, {**body, "encoding_format": "bytes_only"})
            items = serial.build_metadata_items(dtype, order, expected.shape[1:], len(PROMPTS))
            assert torch.equal(stacked(serial.decode_pooling_output(items, answer.content)), rounded)
            answer = post(server, {**body, "encoding_format": "base64"})
            rows = [base64.b64decode(entry["embedding"]) for entry in answer.json()["data"]]
            assert torch.equal(stacked(serial.binary2tensor(row, (-1,), dtype, order) for row in rows), rounded)
    finally:
        server.kill()


def post(server: Process, body: dict[str, Any]) -> requests.Response:
    answer = requests.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer


def stacked(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.float() for tensor in tensors])


def test_the_server_by_its_module(home: Path) -> None:
    """`python -m cenote.entrypoints.openai.api_server` is `cenote serve`: here it refuses an option."""
    done = subprocess.run(
        [sys.executable, "-m", "cenote.entrypoints.openai.api_server", "--model", "x", "-tp", "8"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cenote: tensor_parallel_size must be 1, got '8': a model runs on one device\n"
