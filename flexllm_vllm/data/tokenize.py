"""Examples to token ids and loss masks, through the model's own chat template.

Which tokens carry loss is decided on characters: the conversation is rendered once, the spans of
the assistant's answers are found in that text, the text is tokenized once with offsets, and a token
carries loss if its first character lies in a span. So no token depends on how a prefix tokenizes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_vllm.data.dataset import DatasetBuilder, TokenizedDataset
from flexllm_vllm.data.errors import DataError, UnsupportedTokenizerError
from flexllm_vllm.data.records import ChatRecord, CompletionRecord, Record, read_records

# Stands for an answer while its place in the rendered text is looked for.
_PLACEHOLDER = "flexllm0placeholder0of0an0answer"


@dataclass(frozen=True)
class TokenizationReport:
    """What became of the lines of a file.

    Attributes:
        num_examples: examples in the dataset.
        num_truncated: of these, those cut to ``max_seq_length`` tokens (the end is lost).
        num_skipped: examples left out because no token with loss remained.
        num_tokens, num_loss_tokens: in the dataset, one epoch.
    """

    num_examples: int
    num_truncated: int
    num_skipped: int
    num_tokens: int
    num_loss_tokens: int


class ExampleTokenizer:
    """Tokenizes records for one model.

    Args:
        tokenizer: a fast ``transformers`` tokenizer. Not shared with other threads while in use.
        chat_template: overrides the tokenizer's own (the server's ``--chat-template``).
        template_kwargs: further variables of the template.

    Raises:
        UnsupportedTokenizerError: the tokenizer gives no character offsets, or has no EOS token.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise UnsupportedTokenizerError(
                f"finetuning needs a fast (tokenizers-based) tokenizer, the model has {kind}"
            )
        if tokenizer.eos_token_id is None:
            raise UnsupportedTokenizerError(
                "the model's tokenizer has no end-of-sequence token: completions could not end"
            )
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._template_kwargs = template_kwargs or {}

    def encode(self, line: int, record: Record) -> tuple[list[int], list[int]]:
        """Token ids and loss mask (1: the token is a target) of one record, both ``[num_tokens]``.

        Raises:
            DataError: the chat template refuses the conversation, or hides where an answer begins.
        """
        if isinstance(record, CompletionRecord):
            input_ids, mask = self._encode_completion(record)
        else:
            input_ids, mask = self._encode_chat(line, record)
        if mask:
            mask[0] = 0  # nothing precedes the first token, so nothing can predict it
        return input_ids, mask

    def _encode_completion(self, record: CompletionRecord) -> tuple[list[int], list[int]]:
        """Prompt, completion, EOS. The prompt is tokenized as ``/v1/completions`` does it."""
        eos = self._tokenizer.eos_token_id
        prompt_ids = self._strip_eos(self._tokenizer(record.prompt)["input_ids"])
        joint_ids = self._strip_eos(self._tokenizer(record.prompt + record.completion)["input_ids"])
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            completion_ids = joint_ids[len(prompt_ids) :]
        else:
            # A token would reach over the border; a request never sees such a token.
            plain = self._tokenizer(record.completion, add_special_tokens=False)
            completion_ids = self._strip_eos(list(plain["input_ids"]))
        completion_ids = [*completion_ids, eos]
        return prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids)

    def _strip_eos(self, input_ids: list[int]) -> list[int]:
        """Without the EOS that some tokenizers append by themselves."""
        if input_ids and input_ids[-1] == self._tokenizer.eos_token_id:
            return list(input_ids[:-1])
        return list(input_ids)

    def _encode_chat(self, line: int, record: ChatRecord) -> tuple[list[int], list[int]]:
        # Templates know the role "system"; "developer" is OpenAI's newer name for it.
        messages = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.content}
            for m in record.messages
        ]
        text = self._render(line, messages)
        spans = [
            self._answer_span(line, messages, i, text)
            for i, message in enumerate(record.messages)
            if message.weight
        ]
        # The template has written BOS where the model wants one.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            int(any(start <= first < end for start, end in spans))
            for first, _ in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), mask

    def _answer_span(
        self, line: int, messages: list[dict[str, str]], index: int, text: str
    ) -> tuple[int, int]:
        """Characters ``[start, end)`` of an answer and its end-of-turn token in the full text."""
        through = self._render(line, messages[: index + 1])
        if not text.startswith(through):
            raise DataError(
                line,
                f"messages[{index}]",
                "the model's chat template renders this answer differently when messages follow; "
                "make it the last message of an example of its own, or give it weight 0",
            )
        # Line breaks behind the end-of-turn token are the template's, the model never writes them.
        end = len(through.rstrip())
        if index > 0:
            prefix = self._render(line, messages[:index], add_generation_prompt=True)
            if through.startswith(prefix):
                return len(prefix), end
        # The generation prompt is not what the template writes before a finished answer (or there
        # is no message before it): look where the text of an answer begins.
        placeholder = [*messages[:index], {**messages[index], "content": _PLACEHOLDER}]
        start = self._render(line, placeholder).find(_PLACEHOLDER)
        if start < 0 or not through.startswith(self._render(line, placeholder)[:start]):
            reason = "the model's chat template does not show where this answer begins"
            raise DataError(line, f"messages[{index}]", reason)
        return start, end

    def _render(
        self, line: int, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> str:
        if self._chat_template is None and not self._tokenizer.chat_template:
            reason = "the served model has no chat template; use 'prompt' and 'completion'"
            raise DataError(line, "messages", reason)
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_kwargs,
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = f"the model's chat template refuses the conversation: {error}"
            raise DataError(line, "messages", reason) from error
        return str(text)


def tokenize_file(
    path: Path, tokenizer: ExampleTokenizer, max_seq_length: int
) -> tuple[TokenizedDataset, TokenizationReport]:
    """Tokenize a JSONL file.

    An example longer than ``max_seq_length`` tokens is truncated at its end; one that then has no
    token with loss is skipped. Both are counted in the report.

    Raises:
        DataError: a line is invalid, the file is empty, or no example with loss remains.
    """
    builder = DatasetBuilder()
    truncated = skipped = 0
    empty = True
    for line, record in read_records(path):
        empty = False
        input_ids, mask = tokenizer.encode(line, record)
        too_long = len(input_ids) > max_seq_length
        if not any(mask[:max_seq_length]):
            skipped += 1
            continue
        truncated += too_long
        builder.add(input_ids[:max_seq_length], mask[:max_seq_length])
    if empty:
        raise DataError(None, None, "the file is empty: it must hold at least one example")
    dataset = builder.build()
    if len(dataset) == 0:
        raise DataError(
            None,
            None,
            f"none of the {skipped} examples has a token to learn within the first "
            f"{max_seq_length} tokens (max_seq_length)",
        )
    report = TokenizationReport(
        num_examples=len(dataset),
        num_truncated=truncated,
        num_skipped=skipped,
        num_tokens=int(dataset.input_ids.size),
        num_loss_tokens=int(dataset.loss_mask.sum()),
    )
    return dataset, report
