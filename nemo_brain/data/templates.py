"""Templates: how a prompt or a list of messages becomes the text and the token ids that the model sees."""

from __future__ import annotations

import string

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
        if self.chat and not tokenizer.chat_template:
            raise ValueError(
                f"{KEY}=chat: the tokenizer has no chat template (set {KEY} to null or to a format string with "
                "{prompt}, or add chat_template.jinja to the tokenizer's directory)"
            )
        self._literals = [] if self.chat else _literals("{prompt}" if template is None else template)
        self._tokenizer = tokenizer
        self._protected = protect(tokenizer)
        self._start = [] if self.chat else start_tokens(tokenizer)

    def render_prompt(self, prompt: str) -> tuple[str, list[int], list[int]]:
        """Text, its start tokens and the other token ids of a plain prompt.

        Start tokens are those that the tokenizer itself puts in front of a text; a chat template writes its own.
        """
        if self.chat:
            return self.render_messages([{"role": "user", "content": prompt}])
        ids = self._protected.encode(prompt.join(map(self._protected.alias, self._literals)))
        if self._start and ids[: len(self._start)] == self._start:  # the format string writes them too
            ids = ids[len(self._start) :]
        return prompt.join(self._literals), self._start, ids

    def render_messages(self, messages: list[dict[str, str]]) -> tuple[str, list[int], list[int]]:
        """Like ``render_prompt``, for messages with a role and a content each.

        Raises:
            ValueError: the template is not ``"chat"``, or the chat template refuses the messages.
        """
        if not self.chat:
            raise ValueError(f"messages need a chat template (set {KEY}=chat, or give a plain prompt)")
        quoted = [{**message, "content": self._protected.quote(message["content"])} for message in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(quoted, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template refuses the messages: {error} (change their roles or order)"
            ) from error
        ids = self._protected.encode(self._protected.unquote(self._protected.alias(rendered)))
        return self._protected.unquote(rendered), [], ids


def _literals(template: str) -> list[str]:
    """The pieces of a format string around its ``{prompt}`` fields."""
    remedy = "use null, chat, or a format string with {prompt}; write {{ and }} for braces"
    if not isinstance(template, str):
        raise ValueError(f"{KEY} is {template!r}, which is not text ({remedy})")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{KEY}: {template!r} is not a format string: {error} ({remedy})") from error
    pieces = [""]
    for literal, field, spec, conversion in parts:
        pieces[-1] += literal
        if field is None:
            continue
        if field != "prompt" or spec or conversion:
            shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{KEY}: {template!r} has the unknown field {{{shown}}} ({remedy})")
        pieces.append("")
    if len(pieces) == 1:
        raise ValueError(f"{KEY}: {template!r} has no {{prompt}} ({remedy})")
    return pieces
