"""From the files of a new job to its data sets."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from flexllm_vllm.api.errors import ApiError, invalid
from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.preferences import tokenize_preferences
from flexllm_vllm.data.tokenize import ExampleTokenizer, TokenizationReport, tokenize_file
from flexllm_vllm.jobs.errors import FileNotStoredError
from flexllm_vllm.jobs.event_types import NewEvent
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import Method


@dataclass
class JobData:
    """Tokenizes files for one model.

    Attributes:
        load_tokenizer: called once, at the first job, from the thread that creates it.
    """

    store: JobStore
    load_tokenizer: Callable[[], ExampleTokenizer]
    # Fast tokenizers refuse two threads at once ("Already borrowed").
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def _tokenizer(self) -> ExampleTokenizer:
        return self.load_tokenizer()

    def path(self, file_id: str, param: str, organization_id: str) -> Path:
        """Where a file of a request lies.

        Raises:
            ApiError: there is no such file, or it has another purpose.
        """
        try:
            file = self.store.files.get(file_id, organization_id)
            if file.purpose != "fine-tune":
                message = f"The purpose of file {file_id} is '{file.purpose}', not 'fine-tune'"
                raise invalid(message, param, "invalid_file_purpose")
            return self.store.files.path(file_id, organization_id)
        except FileNotStoredError as error:
            raise file_not_found(error, param) from None

    def tokenize(
        self, source: Path, target: Path, method: Method, max_seq_length: int, param: str
    ) -> TokenizationReport:
        """Writes a data set.

        Raises:
            ApiError: a line that is no example, named; or the file was deleted since.
        """
        tokenize = tokenize_preferences if method == "dpo" else tokenize_file
        try:
            with self._tokenizing:
                dataset, report = tokenize(source, self._tokenizer, max_seq_length)
        except DataError as error:
            raise invalid(str(error), param, f"invalid_{param}") from None
        except FileNotFoundError:
            raise file_not_found(FileNotStoredError(source.name), param) from None
        dataset.save(target)
        return report


def file_not_found(error: FileNotStoredError, param: str) -> ApiError:
    """A file that a job names and that is not there, or not any more."""
    return ApiError(404, str(error), param, "file_not_found")


def report_events(
    what: str, file_id: str, report: TokenizationReport, max_seq_length: int
) -> list[NewEvent]:
    """What became of a file's lines; ``what`` is training or validation."""
    events = [NewEvent(f"Validating {what} file: {file_id}")]
    if report.num_truncated:
        message = f"{report.num_truncated} examples are truncated to {max_seq_length} tokens"
        data = {"num_truncated": report.num_truncated, "max_seq_length": max_seq_length}
        events.append(NewEvent(message, "warn", data=data))
    if report.num_skipped:
        message = f"{report.num_skipped} examples are skipped: no token to learn remains in them"
        events.append(NewEvent(message, "warn", data={"num_skipped": report.num_skipped}))
    return events
