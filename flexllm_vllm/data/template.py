"""The model's own chat template, and where the answers lie in what it renders."""

import re
from dataclasses import replace
from typing import Any

from flexllm_vllm.data.conversation import Conversation
from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.fields import shorten
from flexllm_vllm.data.probe import check_expressible, shape

# Stands for an answer while its place in the rendered text is looked for.
_PLACEHOLDER = "flexllm0placeholder0of0an0answer"
# Shapes of conversations that are remembered as expressible: files have few.
_MAX_SHAPES = 1024
# A template's own error message may quote the whole conversation.
_MAX_ERROR = 300
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DEVELOPER = re.compile("""['"]developer['"]""")

Span = tuple[int, int]


class ChatTemplate:
    """Renders conversations for one model.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        chat_template: overrides the tokenizer's own.
        template_kwargs: further variables of the template.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None, template_kwargs: dict[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._template_kwargs = template_kwargs
        self._expressible: set[tuple[Any, ...]] = set()

    def render(self, conversation: Conversation) -> str:
        """The whole text of a conversation.

        Raises:
            DataError: the model has no template, it refuses the conversation, or would drop a part
                of it (named).
        """
        text = self._render(conversation)
        key = shape(conversation)
        if key not in self._expressible:
            check_expressible(self._render, conversation)
            if len(self._expressible) == _MAX_SHAPES:
                self._expressible.clear()
            self._expressible.add(key)
        return text

    def answer_spans(self, conversation: Conversation, indices: list[int], text: str) -> list[Span]:
        """Characters ``[start, end)`` of answers and their end-of-turn tokens.

        A template that marks its answers with ``{% generation %}``, as ``transformers`` defines it
        for ``return_assistant_tokens_mask``, is taken at its word. Others are rendered again
        without what follows the answer, and without the answer.

        Args:
            conversation: the whole conversation.
            indices: assistant messages in it, in order.
            text: what :meth:`render` made of the conversation.

        Raises:
            DataError: the template hides where an answer begins or ends, or leaves out a part of
                it, as some do with what stands before ``</think>``.
        """
        template = self._template(conversation)
        if _GENERATION.search(template):
            spans = self._marked_answer_spans(conversation, template, indices)
        else:
            spans = [self._answer_span(conversation, index, text) for index in indices]
        for index, (start, end) in zip(indices, spans, strict=True):
            content = conversation.messages[index].content
            if _without_spaces(content) not in _without_spaces(text[start:end]):
                reason = "the model's chat template leaves out or changes a part of this answer"
                raise DataError(conversation.line, f"{conversation.places[index]}.content", reason)
        return spans

    def _marked_answer_spans(
        self, conversation: Conversation, template: str, indices: list[int]
    ) -> list[Span]:
        marked = self._marked_spans(conversation, template)
        answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if len(marked) != len(answers):
            marked = _joined(marked)  # some templates mark an answer and its end separately
        if len(marked) != len(answers):
            reason = (
                f"the model's chat template marks {len(marked)} answers with generation tags, the "
                f"conversation has {len(answers)}"
            )
            raise DataError(conversation.line, conversation.field, reason)
        return [marked[answers.index(index)] for index in indices]

    def _answer_span(self, conversation: Conversation, index: int, text: str) -> Span:
        line, place = conversation.line, conversation.places[index]
        through = self._render(conversation.first(index + 1))
        if not text.startswith(through):
            advice = "make it the last message of an example of its own, or give it weight 0"
            if not place.startswith("messages"):
                advice = "let it be the last message of the output"
            reason = (
                "the model's chat template renders this answer differently when messages follow"
            )
            raise DataError(line, place, f"{reason}; {advice}")
        # Line breaks behind the end-of-turn token are the template's, the model never writes them.
        end = len(through.rstrip())
        if index > 0:
            prefix = self._render(conversation.first(index), add_generation_prompt=True)
            if through.startswith(prefix):
                return len(prefix), end
        # The generation prompt is not what the template writes before a finished answer (or there
        # is no message before it): look where the text of an answer begins.
        plain = replace(conversation.messages[index], content=_PLACEHOLDER, tool_calls=())
        placeholder = self._render(conversation.first(index + 1).with_message(index, plain))
        start = placeholder.rfind(_PLACEHOLDER)
        if start < 0 or not through.startswith(placeholder[:start]):
            reason = "the model's chat template does not show where this answer begins"
            raise DataError(line, place, reason)
        return start, end

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        template = self._template(conversation)
        try:
            text = self._tokenizer.apply_chat_template(
                _as_template_input(conversation, template),
                tools=list(conversation.tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_kwargs,
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = f"the model's chat template refuses the conversation: {error}"
            reason = shorten(reason, _MAX_ERROR)
            raise DataError(conversation.line, conversation.field, reason) from error
        return str(text)

    def _marked_spans(self, conversation: Conversation, template: str) -> list[Span]:
        """Spans of the template's generation blocks, in order."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[_as_template_input(conversation, template)],
            tools=list(conversation.tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._template_kwargs},
        )
        return [(int(start), int(end)) for start, end in spans[0]]

    def _template(self, conversation: Conversation) -> str:
        """The text of the template: models may have another one for conversations with tools."""
        if self._chat_template is None and not self._tokenizer.chat_template:
            reason = "the served model has no chat template; use 'prompt' and 'completion'"
            raise DataError(conversation.line, conversation.field, reason)
        tools = list(conversation.tools) or None
        try:
            return str(self._tokenizer.get_chat_template(self._chat_template, tools))
        except ValueError as error:  # several templates, none of them the default
            raise DataError(conversation.line, conversation.field, str(error)) from error


def _without_spaces(text: str) -> str:
    """Templates trim answers, and set thinking off by line breaks."""
    return "".join(text.split())


def _joined(spans: list[Span]) -> list[Span]:
    """The spans, with those that touch made one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _as_template_input(conversation: Conversation, template: str) -> list[dict[str, Any]]:
    """The messages as vLLM gives them to the template for a request."""
    messages = [message.as_template_input() for message in conversation.messages]
    developer = [message for message in messages if message["role"] == "developer"]
    if not developer or _DEVELOPER.search(template):
        return messages
    # OpenAI's newer name for the system's role. vLLM renames it where the template does not know
    # it, and then makes one system message of all.
    for message in developer:
        message["role"] = "system"
    system = [message for message in messages if message["role"] == "system"]
    if len(system) == 1 and messages[0] is system[0]:
        return messages
    content = "\n\n".join(message["content"] for message in system if message["content"])
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": content}, *others]
