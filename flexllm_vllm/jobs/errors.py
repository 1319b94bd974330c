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


class StoreVersionError(RuntimeError):
    """The store on disk was written by another version of this package."""
