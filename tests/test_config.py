"""Options: names, values and precedence, from flags, environment, file and `LLM` keywords; and what is exported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cenote
from cenote import LLM, config, settings
from cenote.cli import flags, main, serve
from cenote.cli.serve import engines_of, limits, models_of
from cenote.config import LAST_RESORT, EngineConfig, ModelConfig, PoolerConfig, ServerConfig, time_of_requests
from cenote.errors import CenoteError, ConfigError
from cenote.foreign import FOREIGN
from cenote.settings import resolve
from tests import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without `CENOTE_*`; what a test puts in is seen by the command line."""
    variables: dict[str, str] = {}
    read = settings.from_environment
    monkeypatch.setattr(flags, "from_environment", lambda: read(variables))
    return variables


def parsed(*argv: str) -> tuple[ModelConfig, EngineConfig, ServerConfig]:
    """What `cenote serve` would run with."""
    found = flags.parse(["serve", *argv])
    assert found.pop("command") == "serve"
    (model, engine, server), _ = resolve(found)
    assert isinstance(model, ModelConfig)
    assert isinstance(engine, EngineConfig)
    assert isinstance(server, ServerConfig)
    return model, engine, server


# --- flags -------------------------------------------------------------------------------------------------------

MODEL: dict[str, tuple[list[str], str, Any]] = {
    "positional": (["a/b"], "model", "a/b"),
    "--model": (["--model", "a/b"], "model", "a/b"),
    "no model": ([], "model", None),
    "one name": (["--served-model-name", "x"], "served_model_name", ("x",)),
    "several names": (["--served-model-name", "x", "y"], "served_model_name", ("x", "y")),
    "names one by one": (["--served-model-name", "x", "--served-model-name", "y"], "served_model_name", ("x", "y")),
    "revision": (["--revision=v2"], "revision", "v2"),
    "number": (["--max-model-len", "12"], "max_model_len", 12),
    "on": (["--allow-pickle"], "allow_pickle", True),
    "off": (["--no-packing"], "packing", False),
    "choice": (["--convert", "embed"], "convert", "embed"),
    "overrides": (["--hf-overrides", '{"a": {"b": [1]}}'], "hf_overrides", {"a": {"b": [1]}}),
    "pooler JSON": (
        ["--pooler-config", '{"pooling_type": "MEAN", "use_activation": false}'],
        "pooler_config",
        PoolerConfig(pooling_type="MEAN", use_activation=False),
    ),
    "pooler alias": (
        ["--override-pooler-config", '{"pooling_type": "MEAN"}'],
        "pooler_config",
        PoolerConfig(pooling_type="MEAN"),
    ),
    "pooler dotted": (["--pooler-config.pooling_type", "MEAN"], "pooler_config", PoolerConfig(pooling_type="MEAN")),
    "pooler dotted, dashes": (
        ["--pooler-config.pooling-type=mean", "--pooler-config.use-activation=false"],
        "pooler_config",
        PoolerConfig(pooling_type="MEAN", use_activation=False),
    ),
    "pooler dotted alias": (
        ["--override-pooler-config.dimensions", "8"],
        "pooler_config",
        PoolerConfig(dimensions=8),
    ),
    "pooler dotted over JSON": (
        ["--pooler-config", '{"pooling_type": "MEAN", "dimensions": 4}', "--pooler-config.dimensions", "8"],
        "pooler_config",
        PoolerConfig(pooling_type="MEAN", dimensions=8),
    ),
}


@pytest.mark.parametrize(("argv", "field", "value"), MODEL.values(), ids=MODEL)
def test_model_flags(argv: list[str], field: str, value: Any) -> None:
    assert getattr(parsed(*argv)[0], field) == value


def test_flags_of_engine_and_server() -> None:
    _, engine, server = parsed(
        *[
            "--max-num-seqs",
            "7",
            "--max-num-batched-tokens",
            "99",
            "--hostname",
            "0.0.0.0",
            "--port",
            "0",
            "--api-key",
            "k1",
            "k2",
            "--api-key",
            "k3",
        ]
    )
    assert engine == EngineConfig(max_num_seqs=7, max_num_batched_tokens=99)
    assert server == ServerConfig(host="0.0.0.0", port=0, api_key=("k1", "k2", "k3"))


def test_every_option_has_a_flag_with_its_help() -> None:
    text = flags.parser()._subparsers._group_actions[0].choices["serve"].format_help()  # type: ignore[union-attr, index]
    for name, layer in settings.known_options().items():
        assert f"--{name.replace('_', '-')}" in text
        assert layer.model_fields[name].description
    assert "default: 127.0.0.1" in text
    words = " ".join(text.split())
    for option in (
        "[priority, fcfs] (default: priority)",
        "[debug, info, warning, error] (default: info)",
        "[none, int8]",
        "[pooling_type: CLS, LAST, MEAN, ALL, STEP]",
    ):
        assert option in words


def test_choices_of_options() -> None:
    assert settings.choices(ServerConfig, "log_level") == {"": ("debug", "info", "warning", "error")}
    assert settings.choices(config.BenchConfig, "measure") == {"": ("throughput", "latency", "batches", "load")}
    assert settings.choices(ServerConfig, "port") == {}
    assert settings.choices(config.ModelConfig, "limit_mm_per_prompt") == {}, "those are keys"
    assert settings.choices(config.ModelConfig, "pooler_config") == {
        "pooling_type": ("CLS", "LAST", "MEAN", "ALL", "STEP"),
        "seq_pooling_type": ("CLS", "LAST", "MEAN"),
        "tok_pooling_type": ("ALL", "STEP"),
    }


FLAG_FAULTS: dict[str, tuple[list[str], str]] = {
    "near": (["--max-model-length", "3"], "unknown flag '--max-model-length'; did you mean '--max-model-len'?"),
    "near, with a value": (["--max-num-seq=3"], "unknown flag '--max-num-seq'; did you mean '--max-num-seqs'?"),
    "abbreviation": (["--rev", "x"], "unknown flag '--rev'"),
    "far": (["--zzz"], "unknown flag '--zzz'; known are: "),
    "field of a field": (
        ["--pooler-config.poolin_type", "MEAN"],
        "unknown pooler config field 'poolin_type'; did you mean 'pooling_type'?",
    ),
    "model twice": (["a", "--model", "b"], "the model is given twice: 'a' and --model 'b'"),
    "models and model": (["a", "b", "--model", "c"], "the model is given twice: 'a' and --model 'c'"),
    "no value": (["--port"], "--port: expected one argument"),
    "broken JSON": (["--hf-overrides", "{"], "hf_overrides.*not valid JSON"),
    "broken pooler JSON": (["--pooler-config", "{", "--pooler-config.dimensions", "8"], "--pooler-config is not valid"),
    "pooler no object": (["--pooler-config", "3", "--pooler-config.dimensions", "8"], "must be a JSON object, got '3'"),
    "not a number": (["--port", "http"], "port: Input should be a valid integer"),
    "number too large": (["--port", "70000"], "port: Input should be less than or equal to 65535"),
    "number too small": (["--max-num-seqs", "0"], "max_num_seqs: Input should be greater than or equal to 1"),
    "no choice": (["--dtype", "float8"], "dtype: Input should be 'auto', 'half'"),
    "generate": (["--runner", "generate"], "does not generate text; use runner 'pooling'"),
    "several devices": (["--tensor-parallel-size", "2"], "tensor_parallel_size must be 1, got '2': a model runs on"),
}


@pytest.mark.parametrize(("argv", "sentence"), FLAG_FAULTS.values(), ids=FLAG_FAULTS)
def test_faults_of_flags(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        parsed(*argv)


@pytest.mark.parametrize(
    ("given", "convert", "default"),
    [
        ({"task": "embed"}, "embed", "embed"),
        ({"task": "embedding"}, "embed", "embed"),
        ({"task": "classify"}, "classify", "classify"),
        ({"task": "score"}, "auto", None),
        ({"task": "reward"}, "auto", None),
        ({"task": "token_classify"}, "auto", "token_classify"),
        ({"task": "token_embed", "convert": "embed"}, "embed", "token_embed"),
        ({"task": "score", "convert": "classify"}, "classify", None),
        ({"task": "embed", "pooler_config": {"task": "token_embed"}}, "embed", "token_embed"),
        ({"convert": "classify"}, "classify", None),
    ],
    ids=str,
)
def test_what_task_of_older_releases_stands_for(given: dict[str, Any], convert: str, default: str | None) -> None:
    (model, *_), notes = resolve(given)
    assert isinstance(model, ModelConfig)
    assert (model.convert, model.pooler_config.task) == (convert, default)
    told = (
        f"task={given.get('task')!r} is the spelling of older releases of vLLM; tasks follow from the model, and "
        "convert or pooler_config.task say what does not"
    )
    assert notes == [told] * ("task" in given)


# --- several models ------------------------------------------------------------------------------------------------


def served(*argv: str) -> list[tuple[str | None, tuple[str, ...], ServerConfig]]:
    """Models and their names, as `cenote serve` would serve them."""
    found = flags.parse(["serve", *argv])
    assert found.pop("command") == "serve"
    return [(model.model, model.served_model_name, server) for model, _, server in models_of(found)[0]]


SEVERAL: dict[str, tuple[list[str], list[tuple[str | None, tuple[str, ...]]]]] = {
    "none": ([], [(None, ())]),
    "one": (["a", "--served-model-name", "x", "y"], [("a", ("x", "y"))]),
    "two": (["a", "b"], [("a", ("a",)), ("b", ("b",))]),
    "two with names": (["a", "b", "--served-model-name", "x", "y"], [("a", ("x",)), ("b", ("y",))]),
    "names first": (["--served-model-name=x", "--served-model-name=y", "a", "b"], [("a", ("x",)), ("b", ("y",))]),
    "the same twice": (["a", "a", "--served-model-name", "x", "y"], [("a", ("x",)), ("a", ("y",))]),
    "three": (["a", "b", "c"], [("a", ("a",)), ("b", ("b",)), ("c", ("c",))]),
}


@pytest.mark.parametrize(("argv", "expected"), SEVERAL.values(), ids=SEVERAL)
def test_several_models(argv: list[str], expected: list[tuple[str | None, tuple[str, ...]]]) -> None:
    found = served("--port", "81", *argv)
    assert [(model, names) for model, names, _ in found] == expected
    assert {server.port for *_, server in found} == {81}


def test_names_of_several_models_from_the_environment(environment: dict[str, str]) -> None:
    environment["CENOTE_SERVED_MODEL_NAME"] = "x,y"
    assert [names for _, names, _ in served("a", "b")] == [("x",), ("y",)]


SEVERAL_FAULTS: dict[str, tuple[list[str], str]] = {
    "too few names": (
        ["a", "b", "--served-model-name", "x"],
        "2 models need as many names: --served-model-name gives 1",
    ),
    "too many names": (
        ["a", "b", "--served-model-name", "x", "y", "z"],
        "2 models need as many names: --served-model-name gives 3",
    ),
    "a name twice": (
        ["a", "b", "--served-model-name", "x", "x"],
        "two models cannot both be served as 'x'; see --served-model-name",
    ),
    "a model twice": (["a", "b", "a"], "two models cannot both be served as 'a'; see --served-model-name"),
    "another option": (["a", "b", "--dtype", "float8"], "dtype: Input should be 'auto', 'half'"),
}


@pytest.mark.parametrize(("argv", "sentence"), SEVERAL_FAULTS.values(), ids=SEVERAL_FAULTS)
def test_faults_of_several_models(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        served(*argv)


# --- engines in other processes -------------------------------------------------------------------------------------


def in_front(*argv: str) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Engines, their names, and whether a tokenizer may bring code, as `cenote serve` would stand in front of them."""
    found = flags.parse(["serve", *argv])
    assert found.pop("command") == "serve"
    model, server, _ = engines_of(found)
    return server.engine, model.served_model_name, model.trust_remote_code


def test_engines() -> None:
    assert in_front("--engine", "a") == (("a",), (), False)
    assert in_front("--engine", "a", "b", "--served-model-name", "x", "y") == (("a", "b"), ("x", "y"), False)
    assert in_front("--engine", "a", "--trust-remote-code") == (("a",), (), True)


def test_engines_from_the_environment(environment: dict[str, str]) -> None:
    environment["CENOTE_ENGINE"] = "a,b"
    assert in_front()[0] == ("a", "b")


def test_variables_of_engines_are_not_those_of_servers_in_front(environment: dict[str, str]) -> None:
    environment.update({"CENOTE_ISA": "avx2", "CENOTE_DTYPE": "float16", "CENOTE_TRUST_REMOTE_CODE": "true"})
    assert in_front("--engine", "a") == (("a",), (), True)
    environment["CENOTE_ENGINE"] = "a"
    assert flags.parse(["engine", "--listen", "a"])["dtype"] == "float16"


FRONT_FAULTS: dict[str, tuple[list[str], str]] = {
    "a model": (["m", "--engine", "a"], "model has no effect with --engine: each engine was started with a model"),
    "models": (["m", "n", "--engine", "a"], "models has no effect with --engine"),
    "of the model": (["--engine", "a", "--dtype", "float16"], "dtype has no effect with --engine"),
    "of the engine": (["--engine", "a", "--threads", "2"], "threads has no effect with --engine"),
    "too few names": (
        ["--engine", "a", "b", "--served-model-name", "x"],
        "2 engines need as many names: --served-model-name gives 1",
    ),
}


@pytest.mark.parametrize(("argv", "sentence"), FRONT_FAULTS.values(), ids=FRONT_FAULTS)
def test_faults_of_servers_in_front(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        in_front(*argv)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "an engine needs a socket; name its path with --listen PATH"),
        (["--listen", "a", "--io-processor-plugin", "p"], "io_processor_plugin has no effect here: plugins run in"),
        (["a", "b", "--listen", "c"], "unknown flag"),
        (["--listen", __file__], "it is a file, not a socket; name another path, or remove it"),
    ],
)
def test_faults_of_engines(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", *argv]) == 2
    assert sentence in capsys.readouterr().err


# --- environment, file, precedence --------------------------------------------------------------------------------


def test_environment(environment: dict[str, str]) -> None:
    environment.update(
        CENOTE_MODEL="a/b",
        CENOTE_SERVED_MODEL_NAME="x,y",
        CENOTE_ALLOW_PICKLE="true",
        CENOTE_PORT="81",
        CENOTE_POOLER_CONFIG='{"pooling_type": "LAST"}',
        HOME="/nowhere",
    )
    model, _, server = parsed()
    assert model.served_model_name == ("x", "y")
    assert (model.model, model.allow_pickle, server.port) == ("a/b", True, 81)
    assert model.pooler_config == PoolerConfig(pooling_type="LAST")


def test_unknown_variable_names_the_nearest(environment: dict[str, str]) -> None:
    environment["CENOTE_MAX_MODEL_LENGTH"] = "3"
    with pytest.raises(ConfigError, match=r"CENOTE_MAX_MODEL_LENGTH: unknown option .*did you mean 'max_model_l"):
        parsed()


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "model: a/b\nserved-model-name: [x, y]\nhostname: 0.0.0.0\nport: 82\nhf-overrides: {is_matryoshka: true}\n"
        "override_pooler_config:\n  pooling_type: MEAN\n"
    )
    model, _, server = parsed("--config", str(file))
    assert model.served_model_name == ("x", "y")
    assert model.hf_overrides == {"is_matryoshka": True}
    assert model.pooler_config == PoolerConfig(pooling_type="MEAN")
    assert (model.model, server.host, server.port) == ("a/b", "0.0.0.0", 82)


FILE_FAULTS = {
    "unknown": ("max_model_length: 3", "unknown option 'max_model_length'; did you mean 'max_model_len'"),
    "not a mapping": ("- model", "must be a mapping of options, got list"),
    "not YAML": ("a: [", "cannot read the config file"),
    "twice": ("host: a\nhostname: b", "gives option 'host' twice"),
}


@pytest.mark.parametrize(("content", "sentence"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_faults_of_a_file(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        parsed("--config", str(file))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        parsed("--config", str(tmp_path / "none.yaml"))


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parsed("--config", str(tmp_path / "empty.yaml")) == parsed()


@pytest.mark.parametrize("alias", [False, True], ids=["name", "alias"])
@pytest.mark.parametrize(
    ("in_file", "in_environment", "in_flags", "expected"),
    [
        (False, False, False, "127.0.0.1"),
        (True, False, False, "file"),
        (True, True, False, "environment"),
        (True, True, True, "flag"),
        (True, False, True, "flag"),
        (False, True, True, "flag"),
    ],
)
def test_flags_go_before_environment_before_file(
    tmp_path: Path,
    environment: dict[str, str],
    alias: bool,
    in_file: bool,
    in_environment: bool,
    in_flags: bool,
    expected: str,
) -> None:
    (tmp_path / "f.yaml").write_text(f"{'hostname' if alias else 'host'}: file\n" if in_file else "")
    if in_environment:
        environment["CENOTE_HOST"] = "environment"
    flag = ["--host", "flag"] if in_flags else []
    assert parsed("--config", str(tmp_path / "f.yaml"), *flag)[2].host == expected


# --- keywords of LLM ----------------------------------------------------------------------------------------------

KEYWORDS: dict[str, tuple[dict[str, Any], str]] = {
    "near": ({"max_model_length": 3}, "unknown option 'max_model_length'; did you mean 'max_model_len'"),
    "far": ({"xyzzy": 3}, "unknown option 'xyzzy'; known are: "),
    "of the server": ({"port": 3}, "unknown option 'port'"),
    "twice": (
        {"pooler_config": {}, "override_pooler_config": {}},
        "option 'pooler_config' is given twice",
    ),
    "value": ({"max_num_seqs": 0}, "max_num_seqs: Input should be greater than or equal to 1"),
    "type": ({"max_model_len": "long"}, "max_model_len: Input should be a valid integer"),
    "devices": ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1, got 2: a model runs on one device"),
    "task": ({"task": "embd"}, "unknown task 'embd'; did you mean 'embed'"),
    "two faults": ({"dtype": "x", "runner": "y"}, r"(?s)(runner.*dtype|dtype.*runner)"),
}


@pytest.mark.parametrize(("keywords", "sentence"), KEYWORDS.values(), ids=KEYWORDS)
def test_faults_of_keywords(keywords: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        LLM(model="/no/such/folder", **keywords)
    assert isinstance(caught.value, ValueError)


def test_notes_of_options_without_effect() -> None:
    _, notes = resolve({"gpu_memory_utilization": 0.9, "tensor_parallel_size": 1, "seed": 0, "port": 9})
    assert notes == [
        f"{name} has no effect: {FOREIGN[name].reason}"
        for name in ("gpu_memory_utilization", "tensor_parallel_size", "seed")
    ]


@pytest.mark.parametrize(
    ("options", "warns"),
    [({}, False), ({"host": "0.0.0.0"}, True), ({"host": "::1"}, False), ({"host": "0.0.0.0", "api_key": "k"}, False)],
    ids=str,
)
def test_limits_that_are_told_at_start(options: dict[str, Any], warns: bool) -> None:
    server = ServerConfig(max_client_batch_size=3, max_body_bytes=1000, **options)
    warning = "warning: 0.0.0.0 may be reached by others, and no --api-key is set"
    assert limits(EngineConfig(max_queued_seqs=7), server) == [
        "limits: 3 inputs and 1000 bytes a request, 10 s of waiting, 7 inputs waiting",
        *[warning] * warns,
    ]


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("", "is empty"),
        (" secret", "begins or ends with white space"),
        ("secret\n", "begins or ends with white space"),
        ("s\u00e9cret", "has characters that no HTTP header carries"),
        ("sec\x00ret", "has characters that no HTTP header carries"),
    ],
)
def test_a_key_that_no_request_can_bring_is_refused_without_showing_it(key: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=f"api_key: key 2 of 2 {fault}") as refused:
        resolve({"api_key": ("other", key)})
    assert "cret" not in str(refused.value)
    assert "other" not in str(refused.value)


@pytest.mark.parametrize("value", ["", "abc,", ",abc", " ", "abc, def"])
def test_an_empty_key_in_the_environment_does_not_open_the_server(
    value: str, environment: dict[str, str], capsys: Any
) -> None:
    environment["CENOTE_API_KEY"] = value
    assert main(["serve", "--port", "0", "--model", "/nowhere/at/all"]) == 2
    assert "cenote: api_key: key" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["api_key: ''", "api_key: [secret, '']", "api_key:"])
def test_an_empty_key_in_a_file_does_not_open_the_server(content: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert main(["serve", "--config", str(file), "--port", "0", "--model", "/nowhere/at/all"]) == 2
    assert "cenote: api_key: " in capsys.readouterr().err


def test_an_empty_key_among_the_flags_does_not_open_the_server(capsys: Any) -> None:
    assert main(["serve", "--port", "0", "--model", "/nowhere/at/all", "--api-key", ""]) == 2
    assert "cenote: api_key: key 1 of 1 is empty" in capsys.readouterr().err


def test_limits_of_an_engine_elsewhere_are_its_own() -> None:
    assert limits(None, ServerConfig()) == ["limits: 2048 inputs and 67108864 bytes a request, 10 s of waiting"]


def test_configs_are_frozen() -> None:
    for layer in (*settings.LAYERS, PoolerConfig):
        made = layer()
        with pytest.raises(ValueError, match="frozen"):
            setattr(made, next(iter(layer.model_fields)), None)


def test_no_name_means_two_things() -> None:
    names = [name for layer in settings.LAYERS for name in layer.model_fields]
    assert len(names) == len(set(names))
    assert not {*settings.ALIASES, *FOREIGN} & set(names)
    assert set(settings.ALIASES.values()) <= set(names)


# --- the command ---------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{cenote.__version__}\n"


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "serve a model over HTTP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["serve", "--prot", "1"], "cenote: unknown flag '--prot'; did you mean '--port'?\n"),
        (
            ["serve", "/no/such/folder", "--port", "0"],
            "cenote: there is no folder '/no/such/folder', and it is not a hub id of",
        ),
        (["sevre"], "cenote: argument COMMAND: invalid choice: 'sevre'"),
    ],
)
def test_faults_are_one_line_and_status_2(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(sentence)
    assert shown.count("\n") == 1


def test_module_is_the_command_and_imports_lazily() -> None:
    """`python -m cenote --version` needs neither torch nor Transformers, and `import cenote` neither."""
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cenote", "--version"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert shown.stdout == f"{cenote.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "cenote.config" in imported
    assert not imported & {"torch", "transformers", "fastapi", "uvicorn", "huggingface_hub"}


# --- the package ---------------------------------------------------------------------------------------------------


def test_all_is_what_is_exported() -> None:
    for name in cenote.__all__:
        assert getattr(cenote, name).__name__ == name
    assert set(cenote.__all__) == set(cenote._HOMES)
    assert dir(cenote) == sorted([*cenote.__all__, "__version__"])
    tree = ast.parse(Path(str(cenote.__file__)).read_text())
    for_type_checkers = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert for_type_checkers == set(cenote.__all__)
    with pytest.raises(AttributeError, match="module 'cenote' has no attribute 'Nothing'"):
        _ = cenote.Nothing


def test_errors_are_ours_and_of_a_kind_that_callers_catch() -> None:
    assert cenote.CenoteError is CenoteError
    assert issubclass(ConfigError, CenoteError)
    assert issubclass(ConfigError, ValueError)


NEAREST: list[tuple[Callable[[], object], str]] = [
    (lambda: PoolerConfig(poolingtype="CLS"), "did you mean 'pooling_type'"),  # type: ignore[call-arg]
    (lambda: ModelConfig(modl="x"), "Extra inputs are not permitted"),  # type: ignore[call-arg]
]


@pytest.mark.parametrize(("make", "sentence"), NEAREST)
def test_config_models_refuse_unknown_fields(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("arguments", "names", "any_name"),
    [
        ({"served_model_name": ["x", "*"]}, ("x",), True),
        ({"served_model_name": "x,*"}, ("x",), True),
        ({"served_model_name": "*"}, (), True),
        ({"served_model_name": ["x"]}, ["x"], None),
        ({"engine_worker_queue_port": 8002}, (), True),
        ({"engine_worker_queue_port": 8002, "any_model_name": False}, (), False),
    ],
    ids=str,
)
def test_a_star_among_the_served_names_stands_for_all(arguments: dict[str, Any], names: Any, any_name: Any) -> None:
    options = serve._with_any_name(arguments)
    assert (options["served_model_name"], options.get("any_model_name")) == (names, any_name)


@pytest.mark.parametrize(
    ("timeout", "of_requests"), [(0, 0), (1, 0.5), (20, 10), (30, 20), (300, 290), (3600.5, 3590.5)], ids=str
)
def test_requests_have_the_time_of_an_end_but_the_last_seconds(timeout: float, of_requests: float) -> None:
    assert time_of_requests(timeout) == of_requests
    assert timeout < 2 * LAST_RESORT or of_requests + LAST_RESORT == timeout, "the process is gone when it has to be"
