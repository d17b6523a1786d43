"""Backbones in int8, bfloat16 and float16 on a CPU: near float32, independent of company, and smaller."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote import LLM
from cenote.cli.serve import report
from cenote.config import EngineConfig, ModelConfig
from cenote.core import Sequence
from cenote.errors import CheckpointError, ConfigError
from cenote.models import probe, resolve
from cenote.models.layouts import Layout, forward
from cenote.models.load import load
from cenote.models.passes import narrow
from cenote.models.passes.subject import Outcome, Settings
from cenote.models.passes.table import prepared
from cenote.pipeline.pipeline import Service
from cenote.tensors import linear, native
from cenote.tensors.chains import Chain
from cenote.tensors.linear import Narrow
from cenote.tensors.packing import pack
from material.corpus import docstrings
from material.retrieval import TOKENS, collect, ndcg_at_10
from material.zoo import ZOO, Architecture, build
from tests import checkpoints
from tests.models.test_adapters import jina
from tests.models.test_parity_zoo import alone, sequences

if native.chosen("auto") == "none":
    pytest.skip("CENOTE_ISA switches the kernels off", allow_module_level=True)

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
AMX = "AMX" in linear.load().paths

COUNTS = {
    "bert": (19, 19), "albert": (8, 8), "distilbert": (18, 18), "roberta": (19, 19), "esm": (19, 20), "mpnet": (19, 19),
    "mobilebert": (47, 47), "convbert": (22, 25), "longformer": (19, 28), "deberta": (18, 18), "t5-gated": (21, 21),
    "nomic-bert": (21, 21), "modernbert": (12, 12), "gpt-neox": (12, 12), "qwen3": (21, 21), "gemma3": (21, 21),
    "mixtral": (12, 12), "bart": (38, 38), "mamba": (6, 12),
}  # fmt: skip
"""Linears that become int8, of all: those that run, have at least 32 outputs and share their weights with nobody."""
STEADY = {"bert", "albert", "distilbert", "roberta", "t5-gated", "nomic-bert", "gpt-neox", "qwen3", "gemma3"}
"""Of these, those whose rows do not move by a last bit with their company in float32."""


def named(name: str) -> Architecture:
    return next(architecture for architecture in ZOO if architecture.name == name)


def narrowed(
    architecture: Architecture, *, int8: bool = False, dtype: torch.dtype | None = None
) -> tuple[Layout, Outcome]:
    layout, outcome = narrowed_model(build(architecture), int8=int8, dtype=dtype)
    assert layout.name == architecture.layout
    return layout, outcome


def narrowed_model(model: Any, *, int8: bool = False, dtype: torch.dtype | None = None) -> tuple[Layout, Outcome]:
    narrowing, kernels = narrow.choose(quantization="int8" if int8 else "none", dtype=dtype), native.load()
    settings = Settings(kernels=kernels, products=narrow.products(kernels, narrowing), narrowing=narrowing)
    subject = prepared(model, settings)
    return subject.layout, subject.outcomes["narrow"]


def rows(layout: Layout, batch: list[Sequence]) -> list[Tensor]:
    return list(forward(layout, pack(batch)).split([len(s) for s in batch]))


@pytest.mark.parametrize("name", COUNTS)
def test_int8_is_near_float32_and_knows_nothing_of_company(name: str) -> None:
    model = build(named(name))
    batch = sequences(model.get_input_embeddings().weight.shape[0])
    layout, outcome = narrowed(named(name), int8=True)
    assert outcome.text.startswith("{} of {} in int8 by ".format(*COUNTS[name]))
    assert not outcome.notes
    found = rows(layout, batch)
    for got, wanted in zip(found, alone(model, batch), strict=True):
        assert float(F.cosine_similarity(got, wanted).mean()) > 0.975
        assert not torch.allclose(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    turned = rows(layout, batch[::-1])[::-1]
    allowed = 0.0 if name in STEADY else 0.02 * float(max(own.abs().max() for own in found))  # a few steps of rounding
    for i, sequence in enumerate(batch):
        assert torch.allclose(found[i], rows(layout, [sequence])[0], rtol=0, atol=allowed)
        assert torch.allclose(found[i], turned[i], rtol=0, atol=allowed)


ROUNDED = [
    (name, path)
    for name in ("bert", "roberta", "deberta", "modernbert", "qwen3", "gemma3", "bart", "mobilebert")
    for path in ("bfloat16", "float16", "AMX-FLOAT16")
]


@pytest.mark.parametrize(("name", "path"), ROUNDED)
def test_halves_equal_a_model_of_rounded_weights(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All arithmetic is float32: the reference is the eager model, its matrices rounded."""
    if path not in linear.load().paths:
        pytest.skip(f"this processor has no {path}")
    dtype = "bfloat16" if path == "bfloat16" else "float16"
    monkeypatch.setitem(linear.FASTEST, dtype, (path,))  # though the CPU may have a faster one
    model = build(named(name))
    batch = sequences(model.get_input_embeddings().weight.shape[0])
    exact = alone(model, batch)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    table = model.get_input_embeddings()
    alone_held = type(table) is nn.Embedding and name != "bart"  # whose encoder and decoder share it
    for module in (*linears, *([table] if alone_held else [])):
        module.weight.data = module.weight.data.to(HALVES[dtype]).float()
    layout, outcome = narrowed(named(name), dtype=HALVES[dtype])
    assert outcome.text.startswith(f"{len(linears)} of {len(linears)} in {linear.PATHS[path].text}")
    for got, wanted, other in zip(rows(layout, batch), alone(model, batch), exact, strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert not torch.allclose(got, other, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.skipif(not AMX, reason="this processor has no AMX, so bfloat16 is widened")
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3"])
def test_bfloat16_is_multiplied_where_the_cpu_can(name: str) -> None:
    model = build(named(name))
    batch = sequences(model.get_input_embeddings().weight.shape[0])
    layout, outcome = narrowed(named(name), dtype=torch.bfloat16)
    assert "in bfloat16 by AMX-BF16" in outcome.text
    found = rows(layout, batch)
    for i, (got, wanted) in enumerate(zip(found, alone(model, batch), strict=True)):
        assert float(F.cosine_similarity(got, wanted).min()) > 0.999
        assert torch.equal(got, rows(layout, [batch[i]])[0])


def test_int8_with_a_half_embedding() -> None:
    layout, outcome = narrowed(named("bert"), int8=True, dtype=torch.float16)
    assert "in int8 by" in outcome.text
    table = layout.backbone.model.get_input_embeddings()
    whole = build(named("bert")).get_input_embeddings()
    ids = torch.tensor([[5, 7, 299]])
    assert torch.equal(table(ids), whole(ids).half().float())
    assert not torch.equal(table(ids), whole(ids))


@pytest.mark.parametrize("options", [{"int8": True}, {"dtype": torch.float16}], ids=str)
def test_the_float32_weights_are_freed(options: dict[str, Any]) -> None:
    model = build(named("bert"))
    watched = [m for m in model.modules() if type(m) is nn.Linear]
    if "dtype" in options:
        watched.append(model.get_input_embeddings())
    own = [weakref.ref(module.weight) for module in watched]
    narrowed_model(model, **options)
    gc.collect()
    assert len(own) >= 19
    assert not any(weight() is not None for weight in own)
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in model.parameters()
        if p.device.type == "cpu"
    }
    weights = {step.weights for chain in chains(model) for step in chain.steps}
    narrow_bytes = sum(own.panels.nbytes for own in weights)
    shapes = [m.weight.shape for m in watched if isinstance(m, nn.Linear)]
    linear_size = sum(map(math.prod, shapes))
    if not AMX and "dtype" in options:
        padded = sum(2 * (out + -out % linear.WIDE_TILE) * into for out, into in shapes)
    elif "dtype" in options:
        padded = sum(2 * (out + -out % linear.TILE) * (into + -into % linear.TILE) for out, into in shapes)
    else:
        padded = sum((out + -out % linear.TILE) * (into + -into % linear.LINE) for out, into in shapes)
    assert narrow_bytes == padded
    assert sum(held.values()) < 4 * sum(p.numel() for p in model.parameters()) - 4 * linear_size + 1024


def chains(model: nn.Module) -> list[Chain[Narrow]]:
    found = [own for module in model.modules() if isinstance(own := vars(module).get("forward"), Chain)]
    return [own for own in found if isinstance(own.steps[0].weights, Narrow)]


def test_weights_that_others_hold_stay() -> None:
    """T5's two names of one embedding, and a Linear that shares its matrix."""
    layout, _ = narrowed(named("t5-gated"), dtype=torch.float16)
    table = layout.backbone.model.get_input_embeddings()
    assert torch.equal(table.weight, build(named("t5-gated")).get_input_embeddings().weight)
    model = build(named("bert"))
    first, second = (model.encoder.layer[i].intermediate.dense for i in (0, 1))
    second.weight = first.weight
    assert narrowed_model(model, int8=True)[1].text.startswith("17 of 19")


def test_a_table_that_is_read_past_its_forward_stays() -> None:
    model = build(named("bert"))
    table = model.get_input_embeddings()
    model.embeddings.LayerNorm.register_forward_hook(lambda _, __, y: y + table.weight[0] * 1e-3)
    whole = table.weight.clone()
    narrowed_model(model, dtype=torch.float16)
    assert torch.equal(table.weight, whole)


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_layers_of_another_kind_stay_in_float32(name: str) -> None:
    model = build(named(name))
    batch = sequences(300)
    layout, outcome = narrowed(named(name), int8=True)
    assert outcome.text == ""
    assert outcome.notes[0].startswith(
        "none of the 12 Linear layers is of the plain kind that could be kept in int8 by"
    )
    for got, wanted in zip(rows(layout, batch), alone(model, batch), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_model_that_does_not_bear_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outlier in every row, a million times the rest, leaves nothing of the rest."""
    model = build(named("roberta-prelayernorm"))
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias.data[3] = 1e6
        elif isinstance(module, nn.Linear) and module.in_features == 64:
            module.weight.data[:, 3] *= 1e-6
    monkeypatch.setattr(probe, "LEAST_COSINE", 0.9999)
    with pytest.raises(CheckpointError, match="does not bear weights in int8 by .*, expected at least 0.9999; leave"):
        narrowed_model(model, int8=True)


def test_rows_that_move_with_their_neighbours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one scale for a whole batch would do."""
    run = Chain.__call__

    def whole(self: Chain[Any], x: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(self.steps[0].weights, Narrow):
            step = x.abs().max() / 127
            x = (x / step).round() * step
        return run(self, x, residual)

    monkeypatch.setattr(Chain, "__call__", whole)
    with pytest.raises(CheckpointError, match="BertModel with weights in int8 by .*: rows move with their neighbours"):
        narrowed(named("bert"), int8=True)


# --- the embedded model ------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[dict[str, Any], float]] = {
    **{path: ({"quantization": "int8"}, 0.998) for path in linear.FASTEST["int8"]},
    "AMX-BF16": ({"dtype": "bfloat16"}, 0.9999),
    "bfloat16": ({"dtype": "bfloat16"}, 0.9999),
    "float16": ({"dtype": "half"}, 0.999999),
    "AMX-FLOAT16": ({"dtype": "half"}, 0.999999),
}
"""Path to options and the least mean cosine to float32 over docstrings."""
COUNTS_OF_TEXTS = [20, *(pytest.param(count, marks=pytest.mark.full) for count in (50, 150))]
"""Docstrings that are embedded; more of them are the same once more."""


def vectors(llm: LLM, texts: tuple[str, ...]) -> np.ndarray:
    return np.array([output.outputs.embedding for output in llm.embed([*texts], use_tqdm=False)])


@pytest.fixture(scope="module", params=COUNTS_OF_TEXTS)
def whole(request: pytest.FixtureRequest) -> np.ndarray:
    """Vectors of that many docstrings in float32."""
    with LLM(auto_truncate=True) as llm:
        rows = vectors(llm, docstrings(request.param))
    rows.flags.writeable = False
    return rows


def kept(path: str) -> bool:
    """Whether `make test` runs it: the fastest for int8 and for bfloat16 here."""
    return path == linear.load().path(linear.PATHS[path].kind) and FORMS[path][0].get("dtype") != "half"


@pytest.fixture(params=[pytest.param(path, marks=() if kept(path) else pytest.mark.full) for path in FORMS])
def llm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, LLM]]:
    path: str = request.param
    if path not in linear.load().paths:
        pytest.skip(f"this processor has no {path}")
    for kind, paths in linear.FASTEST.items():
        monkeypatch.setitem(linear.FASTEST, kind, (path,) if path in paths else paths)
    with LLM(auto_truncate=True, **FORMS[path][0]) as llm:
        yield path, llm


def test_vectors_of_real_text(llm: tuple[str, LLM], whole: np.ndarray) -> None:
    path, own = llm
    assert f"37 of 37 in {linear.PATHS[path].text}, cosine" in own.info.report.linears
    assert not own.info.report.warnings
    assert own.info.report.dtype == {"half": "float16"}.get(dtype := FORMS[path][0].get("dtype", "float32"), dtype)
    texts = docstrings(len(whole))
    found = vectors(own, texts)
    cosines = (found * whole).sum(axis=1)
    assert cosines.mean() > FORMS[path][1]
    assert cosines.min() > 1 - 4 * (1 - FORMS[path][1])
    assert cosines.mean() < 1 - 1e-8, "it is not float32"
    few = (texts[3], texts[17])
    assert np.array_equal(vectors(own, few), found[[3, 17]]), "company changes nothing, not a bit"
    assert np.array_equal(vectors(own, texts[::-3]), found[::-3])


@pytest.mark.full
@pytest.mark.parametrize("count", [120, 250, 1000])
def test_search_is_as_good_in_int8(count: int, record_property: Callable[[str, object], None]) -> None:
    pairs = collect(count)
    texts = (*pairs.queries, *pairs.documents)
    found = []
    for options in ({}, {"quantization": "int8"}):
        with LLM(auto_truncate=True, max_model_len=TOKENS, **options) as llm:
            own = vectors(llm, texts)
            found.append(ndcg_at_10(own[:count], own[count:]))
    record_property("ndcg@10", found)
    assert found[0] > 0.5
    assert abs(found[1] / found[0] - 1) < 0.01


# --- options and other models --------------------------------------------------------------------------------------


SHORT = tuple(checkpoints.SHORT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A tiny BERT, and its vectors of `SHORT` in float32."""
    folder = checkpoints.bert(tmp_path_factory.mktemp("tiny"))
    with LLM(str(folder)) as llm:
        return folder, vectors(llm, SHORT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantization": "int8"}, "int8 fell back to float32: "),
        ({"dtype": "half"}, "float16 fell back to float32: "),
        ({"quantization": "int8", "dtype": "bfloat16"}, "int8 and bfloat16 fell back to float32: "),
    ],
    ids=str,
)
@pytest.mark.parametrize("cause", ["switched off", "no compiler"])
def test_without_the_kernel_it_is_float32(
    options: dict[str, Any],
    reason: str,
    cause: str,
    tiny: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CENOTE_ISA", raising=False)  # what is named is not done without
    if cause == "no compiler":

        def missing(_: str) -> None:
            raise RuntimeError("there is no C++ compiler")

        monkeypatch.setattr(linear, "load", missing)
    more = {"native_kernels": False} if cause == "switched off" else {}
    folder, whole = tiny
    with LLM(str(folder), **options, **more) as llm:
        assert llm.info.report.dtype == "float32"
        assert llm.info.report.linears == ""
        told = "native kernels are switched off" if more else "there is no C++ compiler"
        assert llm.info.report.warnings == (reason + told,)
        assert np.allclose(vectors(llm, SHORT), whole, atol=1e-6)


def test_report() -> None:
    service = Service.open(ModelConfig(quantization="int8"), EngineConfig())
    try:
        lines = report(service)
    finally:
        service.engine.close()
    assert lines[1].startswith("runs: float32 on cpu, packed")
    assert lines[2].startswith("Linear layers: 37 of 37 in int8 by ")
    assert 0.99 < float(lines[2].split("cosine ")[1].split()[0]) < 1


def test_quantization_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "device", lambda _: torch.device("cuda", 1))
    with pytest.raises(
        ConfigError, match="quantization int8 is for CPUs, and the device is cuda:1; leave it out or set"
    ):
        load(ModelConfig(quantization="int8"))


@pytest.mark.parametrize("value", ["int4", "awq", "fp8", ""])
def test_other_quantizations_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="quantization: Input should be 'none' or 'int8'"):
        LLM(quantization=value)


def test_no_quantization() -> None:
    assert ModelConfig(quantization=None).quantization == "none"  # type: ignore[arg-type]


def test_adapters(tmp_path: Path) -> None:
    folder = jina(tmp_path / "jina")
    texts = list(checkpoints.SHORT)
    found = {}
    for name, options in {"float32": {}, "int8": {"quantization": "int8"}, "float16": {"dtype": "float16"}}.items():
        with LLM(str(folder), **options) as llm:
            assert ("in int8 by" in llm.info.report.linears) == (name == "int8")
            for adapter in ("retrieval_query", "separation", None):
                asked = {"input_type": adapter} if adapter else {}
                outputs = llm.embed(texts, use_tqdm=False, **asked)
                found[name, adapter] = np.array([output.outputs.embedding for output in outputs])
    for name, least in (("int8", 0.99), ("float16", 0.99999)):
        for adapter in ("retrieval_query", "separation", None):
            assert (found[name, adapter] * found["float32", adapter]).sum(1).min() > least
        other = (found[name, "separation"] * found["float32", None]).sum(1)
        assert other.min() < 0.99, "another adapter is further away"


Headed = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Headed:
    """Scores of a classifier, and the weights of a SPLADE model, whose head holds the token embedding, by options."""
    folder = tmp_path_factory.mktemp("headed")
    classifier = checkpoints.classifier(folder / "classifier", num_labels=3)
    splade = checkpoints.classifier(folder / "splade", head="ForMaskedLM")

    def values(**options: Any) -> tuple[np.ndarray, np.ndarray]:
        with LLM(str(classifier), **options) as llm:
            scores = np.array([o.outputs.probs for o in llm.classify(checkpoints.SHORT, use_tqdm=False)])
        with LLM(str(splade), convert="sparse", **options) as llm:
            outputs = llm.encode(checkpoints.SHORT, pooling_task="embed", use_tqdm=False)
            return scores, np.array([output.outputs.data.numpy() for output in outputs])

    return values


@pytest.fixture(scope="module")
def exact(headed: Headed) -> tuple[np.ndarray, np.ndarray]:
    """Both in float32."""
    return headed()


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "float16"}, {"dtype": "bfloat16"}], ids=str)
def test_heads_stay_in_float32(options: dict[str, Any], headed: Headed, exact: tuple[np.ndarray, np.ndarray]) -> None:
    scores, weights = zip(exact, headed(**options), strict=True)
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.1
    cosines = (weights[0] * weights[1]).sum(1) / np.linalg.norm(weights[0], axis=1) / np.linalg.norm(weights[1], axis=1)
    assert cosines.min() > 0.98
