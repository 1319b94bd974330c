"""What users may send to ``/v1/files`` and ``/v1/uploads``, beside the content itself."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, Field, ValidationError

from flexllm_vllm.api.errors import invalid
from flexllm_vllm.api.request_body import RequestBody
from flexllm_vllm.jobs.files import UPLOADED
from flexllm_vllm.jobs.names import display_name
from flexllm_vllm.jobs.uploads import MAX_PARTS

_RESULTS = "fine-tune-results"


def _purpose(value: str) -> str:
    if value == _RESULTS:
        raise ValueError(f"files of the purpose '{_RESULTS}' are written by jobs, not uploaded")
    if value != UPLOADED:
        raise ValueError(f"'{value[:40]}' is not one of ['{UPLOADED}'], the purpose of files here")
    return value


Purpose = Annotated[
    str, AfterValidator(_purpose), Field(json_schema_extra={"enum": [UPLOADED], "type": "string"})
]
Filename = Annotated[
    str,
    AfterValidator(display_name),
    Field(description="Shown with the file; at most 255 characters, its folder is left out."),
]


class ExpiresAfter(RequestBody):
    """When a file vanishes by itself: 1 hour to 30 days after its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class FileCreateRequest(RequestBody):
    """A file that shall be: the fields of the form of ``POST /v1/files``."""

    filename: Filename
    purpose: Purpose
    expires_after: ExpiresAfter | None = None

    @property
    def expires_after_s(self) -> int | None:
        """Seconds that the file will exist; None: until it is deleted."""
        return None if self.expires_after is None else self.expires_after.seconds


# The fields of the form, as the stock client names them.
FORM_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class UploadCreateRequest(FileCreateRequest):
    """Body of ``POST /v1/uploads``."""

    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[str, Field(min_length=1, max_length=255)]


class UploadCompleteRequest(RequestBody):
    """Body of ``POST /v1/uploads/{upload_id}/complete``."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_PARTS)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


def file_request(filename: str, fields: Mapping[str, str]) -> FileCreateRequest:
    """The fields of a form, checked.

    Raises:
        ApiError, RequestValidationError: names the field.
    """
    values: dict[str, Any] = {"filename": filename}
    if "purpose" in fields:
        values["purpose"] = fields["purpose"]
    expires_after: dict[str, Any] = {
        name: fields[f"expires_after[{name}]"]
        for name in ("anchor", "seconds")
        if f"expires_after[{name}]" in fields
    }
    if "seconds" in expires_after:
        seconds = expires_after["seconds"]
        if not (seconds.isascii() and seconds.isdecimal() and len(seconds) < 20):
            message = f"Invalid value for 'expires_after.seconds': not an integer: {seconds[:40]}"
            raise invalid(message, "expires_after.seconds")
        expires_after["seconds"] = int(seconds)
    if expires_after:
        values["expires_after"] = expires_after
    try:
        return FileCreateRequest.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(
            [{**found, "loc": ("body", *_of_form(found["loc"]))} for found in error.errors()]
        ) from None


def check_purpose(fields: Mapping[str, str]) -> None:
    """Refuse the purpose of a form as soon as it is there, which with the stock client is before
    the file.

    Raises:
        RequestValidationError: see :func:`file_request`.
    """
    if "purpose" in fields:
        file_request("unnamed", {"purpose": fields["purpose"]})


def _of_form(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The file's name is no field of the form: it comes with the file."""
    return ("file", "filename") if location == ("filename",) else location
