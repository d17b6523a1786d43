"""Chat templates, which come with checkpoints and sometimes with requests, rendered within a budget.

Transformers renders them, with its sandbox, which keeps a template from reaching out, but not from running for ever or
from making a text of gigabytes. Here its environment has a meter: every block that is run costs a step, and so do the
characters and elements that are made, before they are made. Work that is not counted, as comparing long texts, is
bounded by the CPU time of the thread, which is looked at now and then.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sized
from functools import cache, lru_cache, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from jinja2 import Template
    from jinja2.runtime import Context
    from transformers import PreTrainedTokenizerBase

MADE_IN_A_STEP = 256
"""Characters or elements that are made at the cost of a step."""
LONGEST_SOURCE = 1 << 16
"""Characters of a template: compiling it takes time, too. The longest of known models have some 30,000."""
MOST_BITS = 1 << 16
"""Bits of an integer."""
LONGEST_SLOW = 1 << 14
"""Characters for filters whose time grows with the square of them."""
SLOW = frozenset({"wordwrap", "urlize", "striptags", "pprint", "xmlattr"})
WIDENING = frozenset({"center", "indent", "batch", "slice", "tojson", "wordwrap", "pprint"})
"""Filters whose integers are widths and counts."""
STRUCTURAL = frozenset(
    {"length", "count", "list", "first", "last", "map", "select", "reject", "selectattr", "rejectattr"}
)
STRUCTURAL |= {"items", "dictsort", "sort", "unique", "groupby", "reverse", "random", "default", "d", "min", "max"}
STRUCTURAL |= {"attr", "abs", "int", "float", "round"}
"""Filters that make no more than they are given."""
LOOKS = 64
"""Charges between two looks at the clock."""
_NUMBER = re.compile(r"\d+")
_WIDTH_BY_VALUE = re.compile(r"\*|\{[^}]*\{")
_thread = threading.local()


class Spent(Exception):
    """A template has used up its budget, or asked for more than it has."""


class Meter:
    """The budget of one rendering.

    Args:
        steps: blocks that may be run, and `MADE_IN_A_STEP` characters each that may be made.
        seconds: CPU time of this thread.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self._steps = steps
        self._left = float(steps)
        self._seconds = seconds
        self._end = time.thread_time() + seconds
        self._charges = 0

    def spend(self, steps: float) -> None:
        """Take steps away.

        Raises:
            Spent: there are not as many left, or the time is over.
        """
        self._left -= steps
        if self._left < 0:
            raise Spent(f"it takes more than {self._steps} steps (--max-template-steps)")
        self._charges += 1
        if self._charges % LOOKS == 0 and time.thread_time() > self._end:
            raise Spent(f"it takes more than {self._seconds:g} s of CPU time (--max-template-seconds)")


def spend(steps: float = 1) -> None:
    """Charge the template that this thread renders."""
    meter: Meter = _thread.meter
    meter.spend(steps)


def _make(size: float) -> None:
    """Charge for characters or elements."""
    spend(size / MADE_IN_A_STEP)


def _length(value: Any) -> int:
    """Return the length of a value, 1 if it has none."""
    return len(value) if isinstance(value, Sized) else 1


def _entries(value: Any) -> Iterator[Any]:
    """Yield a value and all that is in it, as often as it is there."""
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        yield entry
        if isinstance(entry, dict):
            waiting += [*entry, *entry.values()]
        elif isinstance(entry, (list, tuple, set)):
            waiting += entry


def _whole(value: Any) -> int:
    """Return the length of the text of a value."""
    if isinstance(value, str):
        return len(value)
    total = 0
    for number, entry in enumerate(_entries(value), start=1):
        total += _length(entry) + 1
        if number % LOOKS == 0:
            spend()
    return total


def _replaced(text: str, *values: Any) -> int:
    return len(text) + (len(text) + 1) * max((len(value) for value in values if isinstance(value, str)), default=0)


def _formatted(text: str, *values: Any) -> int:
    """Return a bound of a formatted text: each field may have the text of all values, and any width named."""
    fields = text.count("%") + text.count("{")
    widths = sum(map(int, (number[:18] for number in _NUMBER.findall(text))))
    if _WIDTH_BY_VALUE.search(text):
        widths += sum(abs(value) for value in _entries(values) if isinstance(value, int)) * fields
    return len(text) + widths + fields * _whole(values)


def _joined(separator: str, values: Any = (), *_: Any) -> int:
    return _whole(values) + len(separator) * _length(values)


def _widened(*values: Any) -> int:
    """Return a bound of a result whose integers are widths and counts."""
    product = 1
    for value in values:
        if isinstance(value, int):
            product *= max(1, abs(value))
    return product * _whole(values)


SIZES: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "format": _formatted,
    "format_map": _formatted,
    "join": _joined,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), _widened),
}
"""Bounds of the results of methods that make more of a text than its length, by the text and the arguments."""


def _counted(value: Any) -> Any:
    """Return a result whose elements are charged: at once if it has a length, else one by one."""
    if isinstance(value, Iterator):
        return _each(value)
    if isinstance(value, Sized):
        _make(len(value))
    return value


def _each(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        spend()
        yield value


def _listed(value: Any) -> Any:
    """Return a list for an iterator, whose length is not known otherwise."""
    return list(value) if isinstance(value, Iterator) else value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is charged before it runs."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment comes first

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        places = [*args[:first], *map(_listed, args[first:])]
        _make(_filtered(name, [*places[first:], *options.values()]))
        return _counted(function(*places, **options))

    return run


def _filtered(name: str, values: list[Any]) -> int:
    """Return a bound of the size of a filter's result, by its value and arguments."""
    if name in STRUCTURAL:
        return sum(map(_length, values))
    if name in SLOW and _whole(values) > LONGEST_SLOW:
        raise Spent(f"the filter {name!r} takes texts of at most {LONGEST_SLOW} characters")
    if name == "join":
        return _joined(max(filter(_is_text, values[1:]), key=len, default=""), values[0])
    if name in ("replace", "format"):
        return SIZES[name](values[0] if _is_text(values[0]) else " " * _whole(values[0]), *values[1:])
    return _widened(*values) if name in WIDENING else _whole(values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


class _Generator(CodeGenerator):
    """Compiles a template to code that charges for each block that it runs, and for the text in it."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        """See `CodeGenerator`."""
        nodes = list(nodes)
        self.writeline(f"environment.spend({1 + _text_in(nodes) / MADE_IN_A_STEP})")
        super().blockvisit(nodes, frame)


def _text_in(statements: Iterable[nodes.Node]) -> int:
    outputs = [part for statement in statements if isinstance(statement, nodes.Output) for part in statement.nodes]
    return sum(len(part.data) for part in outputs if isinstance(part, nodes.TemplateData))


class Environment(ImmutableSandboxedEnvironment):
    """Transformers' environment with a meter.

    Args:
        source: the environment that Transformers makes.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, source: Any) -> None:
        super().__init__(
            trim_blocks=source.trim_blocks,
            lstrip_blocks=source.lstrip_blocks,
            extensions=[type(extension) for extension in source.extensions.values()],
            finalize=_weighed,
        )
        self.filters = {name: _guarded(name, function) for name, function in source.filters.items()}
        self.tests = dict(source.tests)
        self.globals = dict(source.globals)
        self.spend = spend
        self.counted = _counted
        self.weighed = _weighed

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        """Charge the elements of loops, and the parts of joined texts."""
        for loop in list(source.find_all(nodes.For)):
            loop.iter = _through("counted", loop.iter)
        for joined in list(source.find_all(nodes.Concat)):
            joined.nodes = [_through("weighed", node) for node in joined.nodes]
        return super()._generate(source, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge for the result of an operator before it is computed."""
        _make(_operated_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __function: Any, *args: Any, **options: Any) -> Any:
        """Charge for a call before it is made, and for its result."""
        if __function is _counted or __function is _weighed:
            return __function(*args)
        method = getattr(__function, "__wrapped__", __function)  # the sandbox wraps `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, list, dict, tuple)):
            args = tuple(map(_listed, args))
            _make(_called(method.__name__, owner, [*args, *options.values()]))
        elif __function is __self.globals["lipsum"]:
            _make(_widened(*args, *options.values()))
        return _counted(super().call(__context, __function, *args, **options))


def _called(name: str, owner: Any, values: list[Any]) -> int:
    """Return a bound of the size of a method's result."""
    if isinstance(owner, str) and name in SIZES:
        return SIZES[name](owner, *values)
    return sum(map(_length, (owner, *values)))


def _through(name: str, node: Any) -> nodes.Expr:
    """Return the expression of a function of the environment called for `node`."""
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, [node], [], None, None, lineno=node.lineno)


def _weighed(value: Any) -> Any:
    _make(_whole(value))
    return value


def _operated_size(operator: str, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return _check_bits(operator, left, right)
    if operator == "%" and isinstance(left, str):
        return _formatted(left, right)
    if operator == "*":
        times = max((abs(value) for value in (left, right) if isinstance(value, int)), default=1)
        return times * max(_length(left), _length(right))
    return _length(left) + _length(right)


def _check_bits(operator: str, left: int, right: int) -> int:
    """Refuse integers of astronomical length, which take ages and all memory.

    Raises:
        Spent: it has more than `MOST_BITS` bits.
    """
    bits = left.bit_length() + right.bit_length()
    if operator == "**":
        bits = left.bit_length() * max(1, right)
    if bits > MOST_BITS:
        raise Spent(f"integers have at most {MOST_BITS} bits")
    return 1


@cache
def _environment() -> Environment:
    return Environment(chat_template_utils._compile_jinja_template("").environment)


@lru_cache(maxsize=32)
def _kept(source: str) -> Template:
    return _environment().from_string(source)


def _compile(source: str) -> Template:
    """Return a template as Transformers' renderer takes it."""
    if len(source) > LONGEST_SOURCE:
        raise Spent(f"it has {len(source)} characters, and at most {LONGEST_SOURCE} are compiled")
    return _kept(source)


def _with(function: Any, **names: Any) -> Any:
    """Return a copy of a function of Transformers' that finds others under these names. The original stays as it is."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@cache
def _applying(kind: Any) -> Callable[..., Any]:
    """Return `apply_chat_template` of a class of tokenizers, in the environment with a meter."""
    render = _with(chat_template_utils.render_jinja_template, _compile_jinja_template=_compile)
    applying: Callable[..., Any] = _with(kind.apply_chat_template, render_jinja_template=render)
    return applying


def apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str | None,
    options: Mapping[str, Any],
    meter: Meter,
) -> str:
    """Return the text of a conversation.

    Args:
        tokenizer: whose special tokens the template may use.
        messages: the conversation.
        template: a Jinja template; `None` = the tokenizer's.
        options: variables of the template.
        meter: its budget.

    Raises:
        Spent: it takes more.
        Exception: anything that a template raises.
    """
    _thread.meter = meter
    kind: Any = type(tokenizer)
    applying = _applying(kind)
    return str(applying(tokenizer, messages, tokenize=False, chat_template=template, **options))
