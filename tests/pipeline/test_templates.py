"""Chat templates are rendered as by Transformers, and hostile ones end within a budget, as the client's fault."""

from __future__ import annotations

import json
from copy import copy
from typing import TYPE_CHECKING, Any

import pytest

from cenote.errors import BadRequest
from cenote.pipeline.options import ChatOptions
from cenote.pipeline.rendering import Bounds, Renderer
from tests.conftest import INFO, JSON

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import Serve

SAID: list[dict[str, Any]] = [
    {"role": "system", "content": "be\nshort"},
    {"role": "user", "content": "  hello {x} %s ü  "},
    {"role": "assistant", "content": "well", "reasoning_content": "hm"},
    {"role": "user", "content": "last"},
]
KWARGS: dict[str, Any] = {
    "number": 1_234_567,
    "flag": True,
    "names": ["b", "a", "b"],
    "table": {"k": [1, 2.5, None], "j": "x"},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2]}}}],
}
FAITHFUL = [
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content | trim }}{% if not loop.last %},"
    "{% endif %}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}:{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.text = ns.text ~ m.content %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.text ~ ns.n ~ none ~ true }}",
    "{% macro show(m, n=1000000) %}[{{ m.role ~ n }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ table | tojson }}{{ messages | length }}",
    "{{ names | unique | join('-') }}{{ names | sort | list }}{{ names | map('upper') | join }}{"
    "{ names | reverse | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ messages[-1].content }}{{ messages[1:] | length }}{{ messages[0].content.split('\n')[1].strip().title() }}",
    "{{ 'a' * 3 }}{{ '%s-%05d' % ('x', number) }}{{ '{:>5}|{:,}'.format('a', number) }}{{ 2 ** 10 }}{{ 7 % 4 }}",
    "{{ messages[1].content.replace('hello', 'bye') | replace('%', '#') | upper }}{"
    "{ 'x' | center(9) }}{{ number // 7 }}",
    "{% for key, value in table.items() %}{{ key }}={{ value }};{% endfor %}{{ table | dictsort }}{{ undefined_name }}",
    "{% set x %}a{{ number }}b{% endset %}{{ x | length }}{% filter upper %}abc{{ flag }}{% endfilter %}",
    "{% for a in range(3) recursive %}{{ a }}{{ cycler('x', 'y').next() }}{% endfor %}{{ dict(a=1) }}{{ bos_token }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}{"
    "{ messages[2].reasoning_content }}{{ names is string }}",
    "{% for m in messages %}{{ m.content | indent(4) | truncate(9) | wordwrap(5) }}{% endfor %}{{ [1, 2] | sum }}",
    "{% for row in names | batch(2, 'z') %}{{ row | join('+') }};{% endfor %}{{ 3.7 | round | int }}{{ '&' | e }}",
]


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(copy(tokenizer), INFO)


@pytest.mark.parametrize("template", FAITHFUL, ids=range(len(FAITHFUL)))
def test_templates_render_as_transformers_renders_them(renderer: Renderer, template: str) -> None:
    expected = renderer.tokenizer.apply_chat_template(SAID, tokenize=False, chat_template=template, **KWARGS)
    assert renderer.template.apply(SAID, template, KWARGS) == expected
    assert expected


@pytest.mark.parametrize(
    "flags", [{"continue_final_message": True}, {"add_generation_prompt": True}], ids=["continued", "prompted"]
)
def test_flags_are_those_of_transformers(renderer: Renderer, flags: dict[str, bool]) -> None:
    template = FAITHFUL[0] + "{% if add_generation_prompt %}go{% endif %}"
    expected = renderer.tokenizer.apply_chat_template(SAID, tokenize=False, chat_template=template, **flags)
    assert renderer.conversations.text(SAID, ChatOptions(template=template, **flags)) == expected


COUNTED = dict.fromkeys(("loops that pass nothing", "macros", "a chain of maps", "doubling lists"), 1 << 16)
"""Steps of templates that come close to their limit one at a time, which for the default takes seconds."""
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that pass nothing": "{% for a in range(99999) %}"
    "{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "a loop over products": "{% for x in [1] * 10 ** 9 %}{% endfor %}",
    "macros": "{% macro f(n) %}{% for i in range(9) %}{{ f(n) if n else '' }}{% endfor %}{% endmacro %}"
    "{% for x in range(99999) %}{% for y in range(99999) %}{{ f(0) }}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a product": "{{ 'a' * 10 ** 11 }}",
    "a product of a list": "{{ ([1] * 10 ** 10) | length }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace as a filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ ('a' * 1000000).join(['b'] * 100000) }}",
    "join as a filter": "{{ ([1] * 100000) | join('a' * 1000000) }}",
    "join of one text many times": "{{ (['a' * 1000000] * 10000) | join }}",
    "repr of one text many times": "{{ ['a' * 1000000] * 10000 }}",
    "upper of one text many times": "{{ (['a' * 1000000] * 10000) | upper | length }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent with a width": "{{ '%*d' % (10000000000, 1) }}",
    "percent of one text many times": "{{ ('%(a)s' * 10000) % {'a': 'a' * 1000000} }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format with a width": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "format of one text many times": "{{ ('{0}' * 10000).format('a' * 1000000) }}",
    "the filter format": "{{ '%10000000000d' | format(1) }}",
    "indent": "{{ ('a\n' * 10000) | indent(1000000) }}",
    "batch": "{{ [1] | batch(10000000000, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10000000000) | list | length }}",
    "tojson": "{{ [1, [2]] | tojson(indent=10000000000) }}",
    "lipsum": "{{ lipsum(100000, false, 99999, 100000) }}",
    "long text in a loop": "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "a chain of maps": "{% for i in range(999) %}{{ range(99999)" + " | map('int')" * 50 + " | sum }}{% endfor %}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_would_not_end_is_refused(renderer: Renderer, kind: str) -> None:
    steps = COUNTED.get(kind, 1 << 20)
    assert renderer.template.bounds.template_steps == 1 << 20
    renderer.template.bounds = Bounds(template_steps=steps)
    refusal = f"^the chat template refuses these messages: it takes more than {steps} steps \\(--max-template-steps\\)"
    with pytest.raises(BadRequest, match=refusal):
        renderer.conversations.text(SAID, ChatOptions(template=ENDLESS[kind]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 10 ** 1000000000 }}", "integers have at most 65536 bits"),
        ("{{ (10 ** 10000) * (10 ** 10000) }}", "integers have at most 65536 bits"),
        ("{{ ('a ' * 100000) | wordwrap(1) }}", "the filter 'wordwrap' takes texts of at most 16384 characters"),
        ("x" * 70_000, "it has 70000 characters, and at most 65536 are compiled"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ raise_exception('no system messages') }}", "no system messages"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ range(1000000) }}", "Range too big"),
        ("{{ '(' * 1000 }}{% if %}", "Expected an expression"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", ""),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_whatever_a_template_raises_is_the_clients_fault(renderer: Renderer, template: str, message: str) -> None:
    with pytest.raises(BadRequest, match="^the chat template refuses these messages: ") as refusal:
        renderer.conversations.text(SAID, ChatOptions(template=template))
    assert message in refusal.value.message
    assert refusal.value.param == "messages"


def test_time_bounds_what_is_not_counted(renderer: Renderer) -> None:
    """Comparisons of long texts cost no step."""
    renderer.template.bounds = Bounds(template_steps=1 << 40, template_seconds=0.2)
    template = "{% set x = 'a' * 10000000 %}{% for i in range(99999) %}{{ 'b' in x }}{{ x == x[1:] }}{% endfor %}"
    with pytest.raises(BadRequest, match=r"more than 0\.2 s of CPU time \(--max-template-seconds\)"):
        renderer.conversations.text(SAID, ChatOptions(template=template))


def test_a_long_conversation_has_steps_enough(renderer: Renderer) -> None:
    messages = [{"role": "user", "content": "a text of some length " * 50}] * 2000
    text = renderer.conversations.text(messages, ChatOptions(template=FAITHFUL[0]))
    assert len(text) > 2_000_000
    assert text == renderer.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=FAITHFUL[0])


def test_the_environment_of_transformers_stays_as_it_is(renderer: Renderer) -> None:
    renderer.conversations.text(SAID, ChatOptions(template=FAITHFUL[0]))
    renderer.template.bounds = Bounds(template_steps=1)
    with pytest.raises(BadRequest, match="it takes more than 1 steps"):
        renderer.conversations.text(SAID, ChatOptions(template="{{ 1 }}{{ 2 }}" + "x" * 300))
    assert renderer.tokenizer.apply_chat_template(SAID, tokenize=False, chat_template="{{ 3 }}") == "3"


def test_over_http_it_is_a_400_and_the_server_goes_on(serve: Serve) -> None:
    client = serve(trust_request_chat_template=True, max_template_steps=1000, chat_template=FAITHFUL[0])
    body = {"messages": SAID, "chat_template": ENDLESS["nested loops"]}
    for _ in range(5):
        answer = client.post("/v1/embeddings", content=json.dumps(body), headers=JSON)
        assert answer.status_code == 400
        assert "more than 1000 steps (--max-template-steps)" in answer.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={"messages": SAID}).status_code == 200
