"""What the job store refuses."""


class FileNotStoredError(LookupError):
    """No file of this id."""

    def __init__(self, file_id: str) -> None:
        self.file_id = file_id
        super().__init__(f"No such File object: {file_id}")


class JobNotFoundError(LookupError):
    """No job of this id."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"Could not find fine tune: {job_id}")


class AdapterNotFoundError(LookupError):
    """No adapter of this name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The model '{name}' does not exist")


class WebhookEndpointNotFoundError(LookupError):
    """No webhook endpoint of this id."""

    def __init__(self, endpoint_id: str) -> None:
        self.endpoint_id = endpoint_id
        super().__init__(f"No such webhook endpoint: {endpoint_id}")


class WebhookLimitError(RuntimeError):
    """An organization has as many webhook endpoints, or an endpoint as many secrets, as it may."""


class AdapterInUseError(RuntimeError):
    """Jobs or merges that have not finished need the adapter."""

    def __init__(self, name: str, users: list[str]) -> None:
        self.name = name
        self.users = users
        super().__init__(
            f"The adapter '{name}' is in use by {', '.join(users)}; cancel it or wait for its end"
        )


class MergeNotFoundError(LookupError):
    """No merge of this id."""

    def __init__(self, merge_id: str) -> None:
        self.merge_id = merge_id
        super().__init__(f"No such merge: {merge_id}")


class TooManyMergesError(RuntimeError):
    """As many merges wait as may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} merges are waiting, the limit of this server; try again later")


class CursorNotFoundError(LookupError):
    """The ``after`` of a listing names nothing that is in the list."""

    def __init__(self, after: str) -> None:
        self.after = after
        super().__init__(f"Nothing in this list has the id '{after}'")


class FileInUseError(RuntimeError):
    """The file belongs to jobs that have not finished."""

    def __init__(self, file_id: str, job_ids: list[str]) -> None:
        self.file_id = file_id
        self.job_ids = job_ids
        super().__init__(
            f"File {file_id} is in use by {', '.join(job_ids)}; cancel the job or wait for its end"
        )


class JobStateError(RuntimeError):
    """The job is not in a state that allows this."""

    def __init__(self, job_id: str, status: str, wanted: str) -> None:
        self.job_id = job_id
        self.status = status
        super().__init__(f"Job {job_id} has status '{status}': it cannot be {wanted}")


class QuotaExceededError(RuntimeError):
    """The organization has what it may have."""

    def __init__(self, quota: str, limit: int, advice: str) -> None:
        self.quota = quota
        self.limit = limit
        super().__init__(f"Your organization has a quota {quota} of {limit}: {advice}")


class IdempotencyConflictError(RuntimeError):
    """The key was used for another request."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"The Idempotency-Key '{key[:80]}' was used for another request within the last 24 "
            "hours; use a new one for each object that you create"
        )


class IdempotencyPendingError(RuntimeError):
    """A request with this key is being served."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"A request with the Idempotency-Key '{key[:80]}' is still being served; try again"
        )


class UploadNotFoundError(LookupError):
    """No upload of this id."""

    def __init__(self, upload_id: str) -> None:
        self.upload_id = upload_id
        super().__init__(f"No such Upload object: {upload_id}")


class UploadStateError(RuntimeError):
    """The upload has ended."""

    def __init__(self, upload_id: str, status: str, wanted: str) -> None:
        self.upload_id = upload_id
        self.status = status
        super().__init__(f"Upload {upload_id} has status '{status}': {wanted}")


class UploadMismatchError(ValueError):
    """The parts of an upload do not make the file that was announced.

    Attributes:
        param: the field of the request that does not fit.
    """

    def __init__(self, message: str, param: str) -> None:
        self.param = param
        super().__init__(message)


class TooManyFilesError(RuntimeError):
    """The server holds as many files as it may."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"This server holds as many files as it may, {limit} (uploads that are not complete "
            "count): delete files that are not needed any more"
        )


class TooManyQueuedJobsError(RuntimeError):
    """As many jobs wait as may."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The queue of this server is full (limit: {limit}): try again when a job has started"
        )


class InsufficientStorageError(RuntimeError):
    """The disk, or what may be used of it, is full."""


class StoreVersionError(RuntimeError):
    """The store on disk was written by another version of this package."""
