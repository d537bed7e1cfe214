"""Templates: how a prompt or a list of messages becomes the text and the token ids that the model sees."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping

import jinja2
from transformers import PreTrainedTokenizerFast

from nemo_brain.data.tokenizers import protect, start_tokens

KEY = "data.template"


class Template:
    """Renders prompts; special tokens come from the template, never from the prompt's text.

    Args:
        tokenizer: the model's tokenizer.
        template: None (the prompt as it is), ``"chat"`` (the tokenizer's chat template, generation prompt added; a
            plain prompt becomes one user message) or a format string with ``{prompt}``.

    Raises:
        ValueError: the template is none of these, or the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        self.chat = template == "chat"
        self.identity = template is None
        if self.chat and (lack := lacks_chat_template(tokenizer)):
            raise ValueError(
                f"{KEY}=chat: the tokenizer {lack} (set {KEY} to null or to a format string with "
                "{prompt}, or add chat_template.jinja to the tokenizer's directory)"
            )
        self._format = (
            None
            if self.chat
            else FormatString("{prompt}" if template is None else template, ("prompt",), KEY, "null, chat")
        )
        self._tokenizer = tokenizer
        self._protected = protect(tokenizer)
        self._start = [] if self.chat else start_tokens(tokenizer)

    def render_prompt(self, prompt: str) -> tuple[str, list[int], list[int]]:
        """Text, its start tokens and the other token ids of a plain prompt.

        Start tokens are those that the tokenizer itself puts in front of a text; a chat template writes its own.
        """
        if self.chat:
            return self.render_messages([{"role": "user", "content": prompt}])
        assert self._format is not None
        ids = self._protected.encode(self._format.fill({"prompt": prompt}, self._protected.alias))
        if self._start and ids[: len(self._start)] == self._start:  # the format string writes them too
            ids = ids[len(self._start) :]
        return self._format.fill({"prompt": prompt}), self._start, ids

    def render_messages(self, messages: list[dict[str, str]]) -> tuple[str, list[int], list[int]]:
        """Like ``render_prompt``, for messages with a role and a content each.

        Raises:
            ValueError: the template is not ``"chat"``, or the chat template refuses the messages.
        """
        if not self.chat:
            raise ValueError(f"messages need a chat template (set {KEY}=chat, or give a plain prompt)")
        text, ids = render_chat(self._tokenizer, messages, generation_prompt=True)
        return text, [], ids


def lacks_chat_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """In words, that there is no template for messages: none at all, or several and none of them named default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and templates and not templates.get("default"):
        return f"has no chat template named default, only {', '.join(templates)}"
    return None if templates else "has no chat template"


def render_chat(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], *, generation_prompt: bool
) -> tuple[str, list[int]]:
    """Text and token ids of messages in the tokenizer's chat template; only the template writes special tokens.

    Raises:
        ValueError: the template refuses the messages.
    """
    protected = protect(tokenizer)
    quoted = [{**message, "content": protected.quote(message["content"])} for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(quoted, tokenize=False, add_generation_prompt=generation_prompt)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the tokenizer's chat template is broken in line {error.lineno}: {error} (mend chat_template.jinja, or "
            "chat_template in tokenizer_config.json)"
        ) from error
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses the messages: {error} (change their roles or order)") from error
    return protected.unquote(rendered), protected.encode(protected.unquote(protected.alias(rendered)))


class FormatString:
    """A template with named fields: its literals are trusted, the values are not.

    Args:
        template: the format string.
        names: the fields; every one of them must occur.
        key: the configuration key that errors name.
        others: what that key may be besides a format string.

    Raises:
        ValueError: it is no format string, or its fields are others.
    """

    def __init__(self, template: str, names: tuple[str, ...], key: str, others: str) -> None:
        fields = " and ".join(f"{{{name}}}" for name in names)
        remedy = f"use {others}, or a format string with {fields}; write {{{{ and }}}} for braces"
        if not isinstance(template, str):
            raise ValueError(f"{key} is {template!r}, which is not text ({remedy})")
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{key}: {template!r} is not a format string: {error} ({remedy})") from error
        self._literals, self._fields = [""], []
        for literal, field, spec, conversion in parts:
            self._literals[-1] += literal
            if field is None:
                continue
            if field not in names or spec or conversion:
                shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise ValueError(f"{key}: {template!r} has the unknown field {{{shown}}} ({remedy})")
            self._fields.append(field)
            self._literals.append("")
        for name in names:
            if name not in self._fields:
                raise ValueError(f"{key}: {template!r} has no {{{name}}} ({remedy})")

    def fill(self, values: Mapping[str, str], trusted: Callable[[str], str] = str) -> str:
        """The text with ``values`` in place of the fields and ``trusted`` applied to the literals."""
        rest = (
            values[field] + trusted(literal) for field, literal in zip(self._fields, self._literals[1:], strict=True)
        )
        return trusted(self._literals[0]) + "".join(rest)
