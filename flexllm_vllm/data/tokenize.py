"""Supervised examples to token ids and loss masks, through the model's own chat template.

Which tokens carry loss is decided on characters: the conversation is rendered once, the spans of
the assistant's answers are found in that text, the text is tokenized once with offsets, and a token
carries loss if its first character lies in a span. So no token depends on how a prefix tokenizes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_vllm.data.conversation import Conversation
from flexllm_vllm.data.dataset import DatasetBuilder, TokenizedDataset
from flexllm_vllm.data.errors import DataError, UnsupportedTokenizerError
from flexllm_vllm.data.records import (
    ChatRecord,
    CompletionRecord,
    PreferenceRecord,
    SupervisedRecord,
    read_records,
)
from flexllm_vllm.data.template import ChatTemplate, Span

# Token ids, and 1 where the token is a target: both [num_tokens].
Example = tuple[list[int], list[int]]


@dataclass(frozen=True)
class TokenizationReport:
    """What became of the lines of a file.

    Attributes:
        num_examples: lines in the dataset. A preference pair is one, though it makes two examples
            of the dataset.
        num_truncated: of these, those cut to ``max_seq_length`` tokens (the end is lost).
        num_skipped: lines left out because no token with loss remained.
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
        self._template = ChatTemplate(tokenizer, chat_template, template_kwargs or {})

    def encode(self, line: int, record: SupervisedRecord) -> Example:
        """Token ids and loss mask (1: the token is a target) of one record, both ``[num_tokens]``.

        Raises:
            DataError: the chat template refuses the conversation, would drop a part of it, or hides
                where an answer begins.
        """
        if isinstance(record, CompletionRecord):
            input_ids, mask = self._encode_completion(record)
        else:
            input_ids, mask = self._encode_chat(line, record)
        return _without_first(input_ids, mask)

    def encode_pair(self, line: int, record: PreferenceRecord) -> tuple[Example, Example]:
        """The preferred and the other example; both begin with the same tokens of the prompt.

        The prompt is tokenized by itself, as a request tokenizes it. Loss is on the assistant's
        tokens of the outputs.

        Raises:
            DataError: as :meth:`encode`; or the two sides come out the same.
        """
        sides = [
            Conversation.of_preference(line, record, "preferred_output", record.preferred),
            Conversation.of_preference(line, record, "non_preferred_output", record.non_preferred),
        ]
        texts = [self._template.render(side) for side in sides]
        spans = [
            self._answers(side, text, range(len(record.messages), len(side)))
            for side, text in zip(sides, texts, strict=True)
        ]
        start = min(side[0][0] for side in spans)
        prompt = texts[0][:start]
        if not texts[1].startswith(prompt):
            reason = "the model's chat template renders the input differently before each output"
            raise DataError(line, "input", reason)
        preferred, other = (
            _without_first(*self._encode_after(prompt, text, answers))
            for text, answers in zip(texts, spans, strict=True)
        )
        if preferred[0] == other[0]:
            reason = "comes out the same as preferred_output: there is nothing to prefer"
            raise DataError(line, "non_preferred_output", reason)
        return preferred, other

    def _encode_completion(self, record: CompletionRecord) -> Example:
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

    def _encode_chat(self, line: int, record: ChatRecord) -> Example:
        conversation = Conversation.of_chat(line, record)
        text = self._template.render(conversation)
        answers = self._answers(conversation, text, range(len(conversation)))
        input_ids, firsts = self._encode_text(text)
        return input_ids, _mask(firsts, answers)

    def _encode_after(self, prompt: str, text: str, answers: list[Span]) -> Example:
        """The tokens of ``prompt``, then those of the rest of ``text``."""
        prompt_ids, _ = self._encode_text(prompt)
        input_ids, firsts = self._encode_text(text)
        if input_ids[: len(prompt_ids)] != prompt_ids:
            # A token would reach over the border; a request never sees such a token.
            output_ids, output_firsts = self._encode_text(text[len(prompt) :])
            input_ids = prompt_ids + output_ids
            firsts = [0] * len(prompt_ids) + [len(prompt) + first for first in output_firsts]
        mask = _mask(firsts, answers)
        return input_ids, [0] * len(prompt_ids) + mask[len(prompt_ids) :]

    def _answers(self, conversation: Conversation, text: str, where: range) -> list[Span]:
        """Spans of the messages with loss among those in ``where``, in order."""
        indices = [index for index in where if conversation.messages[index].weight]
        return self._template.answer_spans(conversation, indices, text)

    def _encode_text(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the first character of each token."""
        # The template has written BOS where the model wants one.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [first for first, _ in encoded["offset_mapping"]]


def _mask(firsts: list[int], spans: list[Span]) -> list[int]:
    """1 where a token's first character lies in a span. Both lists are in order."""
    mask = []
    remaining = iter(spans)
    start, end = next(remaining, (0, 0))
    for first in firsts:
        while first >= end > 0:
            start, end = next(remaining, (0, 0))
        mask.append(int(start <= first < end))
    return mask


def _without_first(input_ids: list[int], mask: list[int]) -> Example:
    if mask:
        mask[0] = 0  # nothing precedes the first token, so nothing can predict it
    return input_ids, mask


def tokenize_file(
    path: Path, tokenizer: ExampleTokenizer, max_seq_length: int
) -> tuple[TokenizedDataset, TokenizationReport]:
    """Tokenize a JSONL file for the method ``supervised``.

    An example longer than ``max_seq_length`` tokens is truncated at its end; one that then has no
    token with loss is skipped. Both are counted in the report.

    Raises:
        DataError: a line is invalid, the file is empty, or no example with loss remains.
    """
    builder = DatasetBuilder()
    truncated = skipped = 0
    for line, record in read_records(path, "supervised"):
        input_ids, mask = tokenizer.encode(line, record)
        too_long = len(input_ids) > max_seq_length
        if not any(mask[:max_seq_length]):
            skipped += 1
            continue
        truncated += too_long
        builder.add(input_ids[:max_seq_length], mask[:max_seq_length])
    dataset = builder.build()
    return dataset, report_on(dataset, len(dataset), truncated, skipped, max_seq_length)


def report_on(
    dataset: TokenizedDataset,
    num_examples: int,
    num_truncated: int,
    num_skipped: int,
    max_seq_length: int,
) -> TokenizationReport:
    """The report on a file.

    Raises:
        DataError: the file had no example, or none is left to learn from.
    """
    if num_examples == 0 and num_skipped == 0:
        raise DataError(None, None, "the file is empty: it must hold at least one example")
    if num_examples == 0:
        raise DataError(
            None,
            None,
            f"none of the {num_skipped} examples has a token to learn within the first "
            f"{max_seq_length} tokens (max_seq_length)",
        )
    return TokenizationReport(
        num_examples=num_examples,
        num_truncated=num_truncated,
        num_skipped=num_skipped,
        num_tokens=int(dataset.input_ids.size),
        num_loss_tokens=int(dataset.loss_mask.sum()),
    )
