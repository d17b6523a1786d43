"""From messages and content parts to prompts, by the chat template of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cenote.errors import BadRequest
from cenote.functions import coalesce
from cenote.pipeline.inputs import Illustrated, flattened
from cenote.pipeline.options import PLAIN_CHAT, Bounds, ChatOptions
from cenote.pipeline.parts import media_type, read, texts_and_pictures

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from transformers import PreTrainedTokenizerBase

    from cenote.pipeline.pictures import PictureRenderer


class ChatTemplate:
    """The chat template of a tokenizer, and those that requests bring.

    Args:
        tokenizer: a Transformers tokenizer.

    Attributes:
        bounds: of the work of one rendering; a server sets them.
        defaults: variables that requests do not set, likewise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.bounds = Bounds()
        self.defaults: Mapping[str, Any] = {}

    @property
    def is_there(self) -> bool:
        """Whether the tokenizer has one."""
        return bool(self._tokenizer.chat_template)

    def apply(self, messages: list[dict[str, Any]], template: str | None, kwargs: Mapping[str, Any]) -> str:
        """Render `messages` by `template` (default: the tokenizer's).

        Raises:
            BadRequest: the template refuses them.
        """
        from cenote.pipeline import templates

        meter = templates.Meter(self.bounds.template_steps, self.bounds.template_seconds)
        try:
            return templates.apply(self._tokenizer, messages, template, {**self.defaults, **kwargs}, meter)
        except Exception as error:  # anything: a template is a program
            reason = str(error) or type(error).__name__
            raise BadRequest(f"the chat template refuses these messages: {reason}", param="messages") from error


class Conversations:
    """Makes prompts of conversations.

    Args:
        name: of the model, for errors.
        template: renders messages.
        pictures: of the model; `None` = it takes none.
    """

    def __init__(self, name: str, template: ChatTemplate, pictures: PictureRenderer | None) -> None:
        self._name = name
        self._template = template
        self._pictures = pictures

    def text(
        self, messages: Seq[Mapping[str, Any]], options: ChatOptions = PLAIN_CHAT, *, structured: bool = False
    ) -> str:
        """Return the text of one conversation, by the request's or the model's chat template.

        Args:
            messages: of the conversation.
            options: how they become text.
            structured: the template gets contents that are lists of parts as they are, not joined to one text.

        Raises:
            BadRequest: there is no template, or it refuses these messages.
        """
        if options.add_generation_prompt and options.continue_final_message:
            raise BadRequest("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        if not messages:
            raise BadRequest("`messages` must not be empty", param="messages")
        if options.template is None and not self._template.is_there:
            raise BadRequest(
                f"{self._name} has no chat template, so `messages` cannot be rendered; send `input`, "
                "or start the server with --chat-template",
                param="messages",
            )
        kwargs = {
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
            **options.kwargs,
        }
        shown = list(map(flattened, messages)) if not structured else [*map(dict, messages)]
        return self._template.apply(shown, options.template, kwargs)

    def prompt(
        self,
        messages: Seq[Mapping[str, Any]],
        options: ChatOptions = PLAIN_CHAT,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str | Illustrated:
        """Return the prompt of one conversation, whose content parts may be pictures.

        Args:
            messages: of the conversation.
            options: how they become text.
            kwargs: arguments of the image processor.

        Raises:
            BadRequest: as `text`; or the model takes no pictures, or a part is neither text nor a picture.
        """
        kind = media_type(messages)
        if kind is None:
            return self.text(messages, options)
        renderer = self._reading(kind)
        shown, sources = read(messages, renderer.placeholder)
        content: Any = texts_and_pictures(shown)
        if options.template or self._template.is_there or not renderer.has_own_template:
            content = self.text(shown, options, structured=True)
        return Illustrated(content, tuple(sources), coalesce(kwargs, {}))

    def of_parts(self, parts: Seq[Any], kwargs: Mapping[str, Any] | None = None) -> str | Illustrated:
        """Return the prompt of content parts: texts alone are a line each; the model's template renders pictures.

        Args:
            parts: content parts of one input.
            kwargs: arguments of the image processor.

        Raises:
            BadRequest: the model takes no pictures, or a part is neither text nor a picture.
        """
        messages = [{"role": "user", "content": [*parts]}]
        kind = media_type(messages)
        if kind is None:
            return str(flattened(messages[0])["content"])
        shown, sources = read(messages, self._reading(kind).placeholder)
        return Illustrated(texts_and_pictures(shown), tuple(sources), coalesce(kwargs, {}))

    def _reading(self, kind: str) -> PictureRenderer:
        """Return the renderer of pictures, which reads content parts of type `kind`.

        Raises:
            BadRequest: the model takes no pictures.
        """
        if self._pictures is None:
            raise BadRequest(
                f"content parts of type {kind!r} are not supported by this model, only text: {self._name} takes no "
                "images, only texts",
                param="messages",
            )
        return self._pictures
