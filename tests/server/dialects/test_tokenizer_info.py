"""What operators let clients see and set of chat templates: `/tokenizer_info`, and defaults of variables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenote.engine.fake import FakeEngine
from tests.conftest import INFO

if TYPE_CHECKING:
    from tests.conftest import Serve

TEMPLATE = "{{ messages[0].content }} {{ mood }}"
BODY = {"messages": [{"role": "user", "content": "hello"}]}


def test_the_tokenizer_is_told_if_the_operator_wants_it(serve: Serve) -> None:
    assert serve(chat_template=TEMPLATE).get("/tokenizer_info").status_code == 404
    answer = serve(chat_template=TEMPLATE, enable_tokenizer_info_endpoint=True).get("/tokenizer_info")
    assert answer.status_code == 200
    told = answer.json()
    assert told["chat_template"] == TEMPLATE
    assert (told["unk_token"], told["do_lower_case"]) == ("[UNK]", True)
    assert told["tokenizer_class"] == "BertTokenizer"
    assert not [value for value in told.values() if "/" in str(value)]
    assert not {"is_local", "local_files_only"} & told.keys()


def test_defaults_of_variables_of_templates(serve: Serve) -> None:
    client = serve(FakeEngine(INFO), chat_template=TEMPLATE, default_chat_template_kwargs={"mood": "world"})
    plain = serve(FakeEngine(INFO), chat_template=TEMPLATE)

    def tokens(path: str, **fields: object) -> list[int]:
        at = client if path == "default" else plain
        return at.post("/tokenize", json={**BODY, **fields}).json()["tokens"]

    assert tokens("default") == tokens("plain", chat_template_kwargs={"mood": "world"})
    assert tokens("default", chat_template_kwargs={"mood": "a"}) == tokens("plain", chat_template_kwargs={"mood": "a"})
    assert tokens("default") != tokens("plain")
