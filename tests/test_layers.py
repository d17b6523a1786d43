"""Imports go down only: a module imports from its own layer or the ones below, functions included, without cycles."""

from __future__ import annotations

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "cenote"

LAYERS = (
    (
        "words",
        (
            "errors",
            "core",
            "adapters",
            "conventions",
            "functions",
            "signals",
            "outputs",
            "cl100k",
            "tasks",
            "option_values",
            "config",
            "foreign",
            "settings",
            "metrics",
            "tokenizer",
        ),
    ),
    ("tensors", ("tensors",)),
    ("models", ("models",)),
    ("engine", ("engine",)),
    ("pipeline", ("pipeline",)),
    ("faces", ("arguments", "calls", "llm", "server")),
    ("command line", ("cli", "vllm", "__main__")),
)
INNER = {
    "models": (
        (
            "files",
            "audit card facts inside keys reading sizes value_types weights transformer_module modules "
            "sentence_transformers configs overrides contents remote_code stacked_lora renamed lora lora_changes "
            "adapted leftovers",
        ),
        ("a model that runs", "traits vision layouts probe model_outputs classifiers poolers lexical"),
        ("kinds of checkpoints", "convert families hub"),
        ("changes of a model", "passes costs"),
        ("a model to serve", "checkpoint building resolve offers model information"),
        ("load", "load"),
    ),
    "server": (
        ("shared by dialects", "errors turns desk admission asked arrivals leaving health serving wire"),
        ("dialects", "routes unread table dialects"),
        ("application", "connections pages describe gate reading tracing app shared ending beside"),
    ),
}
"""Layers of folders, lowest first, by the names of their modules and folders."""
HEIGHT = {part: height for height, (_, parts) in enumerate(LAYERS) for part in parts}
WITHOUT = {"words": {"torch", "transformers", "starlette"}, "tensors": {"transformers", "starlette"}}
"""Packages that a layer must not import when it is loaded."""

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = frozenset(map(name, MODULES))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path, *, at_load: bool = False) -> set[str]:
    """Full names of what `path` imports, in functions too unless `at_load`."""
    found: set[str] = set()
    tree = parsed(path)
    nodes = [n for n in tree.body if not isinstance(n, ast.If)] if at_load else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    """Modules of the package that `path` imports, without the package's name."""
    return {n.removeprefix("cenote.") for n in imports(path) if n.startswith("cenote.")} & NAMES


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down(path: Path) -> None:
    me = name(path)
    for target in own(path):
        assert HEIGHT[target.split(".")[0]] <= HEIGHT[me.split(".")[0]], f"{me} imports {target}, which is above it"


@pytest.mark.parametrize("folder", INNER)
def test_imports_go_down_inside(folder: str) -> None:
    """Inside a folder, too, a module imports from its own layer or the ones below; every module has a layer."""
    heights = {part: height for height, (_, parts) in enumerate(INNER[folder]) for part in parts.split()}
    for path in MODULES:
        at, _, me = name(path).partition(".")
        if at != folder or not me:
            continue
        inside = [target.partition(".")[2] for target in own(path) if target.startswith(f"{folder}.")]
        above = [target for target in inside if heights[target.split(".")[0]] > heights[me.split(".")[0]]]
        assert not above, f"{name(path)} imports {above}, which are above it"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_light_layers_stay_light(path: Path) -> None:
    layer = LAYERS[HEIGHT[name(path).split(".")[0]]][0]
    heavy = {module.split(".")[0] for module in imports(path, at_load=True)} & WITHOUT.get(layer, set())
    assert not heavy, f"{name(path)} is in the layer {layer!r} and imports {heavy} when it is loaded"


def test_no_cycles() -> None:
    graph = {name(path): own(path) - {name(path)} for path in MODULES}
    list(TopologicalSorter(graph).static_order())


def test_every_module_has_a_header() -> None:
    missing = [name(path) for path in MODULES if parsed(path).body and not ast.get_docstring(parsed(path))]
    assert not missing


def test_folders_of_tests_mirror_the_package() -> None:
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    of_package = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    below_vllm = {folder for folder in of_package if Path("vllm") in folder.parents}  # which have names alone
    assert folders == of_package - below_vllm
    assert not [name for name in LONGEST if not (tests / f"{name}.py").is_file()]


APART = {"benchmarks": {"tests"}, "material": {"benchmarks", "cenote", "tests"}}
"""Packages that a folder beside the tests must not import."""


@pytest.mark.parametrize("folder", APART)
def test_folders_beside_the_tests_stand_apart(folder: str) -> None:
    paths = [*(ROOT / folder).rglob("*.py")]
    assert paths
    assert not [str(path) for path in paths if APART[folder] & {target.split(".")[0] for target in imports(path)}]
