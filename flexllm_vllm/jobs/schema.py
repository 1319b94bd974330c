"""The tables of the job store. A change of them needs a migration: see ``migrations/``."""

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)

# The owner of everything on a server without tenants.
LOCAL_ORGANIZATION = "local"

metadata = MetaData()


def _table(name: str, *columns: Any) -> Table:
    """A table whose ``seq`` orders its rows by creation and is never used twice."""
    seq = Column("seq", Integer, primary_key=True)
    return Table(name, metadata, seq, *columns, sqlite_autoincrement=True)


def _organization() -> Column[str]:
    """The tenant that owns a row."""
    return Column(
        "organization_id", String, nullable=False, server_default=LOCAL_ORGANIZATION, index=True
    )


files = _table(
    "files",
    Column("id", String, nullable=False, unique=True),
    Column("filename", String, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("purpose", String, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("expires_at", Integer),
    _organization(),
)

# Uploads in parts (``/v1/uploads``). The parts lie beside the files until they become one.
uploads = _table(
    "uploads",
    Column("id", String, nullable=False, unique=True),
    Column("filename", String, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("purpose", String, nullable=False),
    Column("mime_type", String, nullable=False),
    Column("status", String, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("expires_at", Integer, nullable=False),
    Column("file_id", String),
    Column("file_expires_after_s", Integer),
    _organization(),
)

upload_parts = _table(
    "upload_parts",
    Column("id", String, nullable=False, unique=True),
    Column("upload_id", String, ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("created_at", Integer, nullable=False),
)
Index("parts_of_upload", upload_parts.c.upload_id)

jobs = _table(
    "jobs",
    Column("id", String, nullable=False, unique=True),
    Column("model", String, nullable=False),
    Column("status", String, nullable=False, index=True),
    # Not foreign keys: the files of a finished job may be deleted.
    Column("training_file", String, nullable=False, index=True),
    Column("validation_file", String, index=True),
    Column("result_file", String),
    Column("suffix", String),
    Column("method", String, nullable=False, server_default="supervised"),
    Column("lora", JSON, nullable=False),
    Column("training", JSON, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("integrations", JSON(none_as_null=True)),
    Column("created_at", Integer, nullable=False),
    Column("started_at", Integer),
    Column("finished_at", Integer),
    Column("trained_tokens", Integer, nullable=False, default=0),
    # The furthest step that was ever done; a run that was interrupted may be behind it.
    Column("step", Integer, nullable=False, default=0),
    Column("total_steps", Integer, nullable=False),
    # The step with which the current run began, for the estimate of its end.
    Column("first_step", Integer, nullable=False, server_default="0"),
    Column("adapter_name", String, nullable=False, unique=True),
    Column("init_adapter_path", String),
    Column("error", JSON(none_as_null=True)),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("pause_requested", Boolean, nullable=False, server_default="0"),
    Column("attempts", Integer, nullable=False, default=0),
    Column("owner", String),  # the engine that runs it: see owner.py
    _organization(),
    Column("metadata", JSON(none_as_null=True)),
)

events = _table(
    "events",
    Column("id", String, nullable=False, unique=True),
    Column("job_id", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("level", String, nullable=False),
    Column("message", String, nullable=False),
    Column("type", String, nullable=False),
    Column("data", JSON(none_as_null=True)),
    # Of events that a run which was interrupted may report again: it is stored once.
    Column("key", String),
)
Index("events_of_job", events.c.job_id, events.c.seq)
Index("events_once", events.c.job_id, events.c.key, unique=True)

# Everything that requests may name as their model beside the base model. ``source`` is job,
# checkpoint, import or merge.
adapters = _table(
    "adapters",
    Column("name", String, nullable=False, unique=True),
    Column("int_id", Integer, nullable=False, unique=True),
    Column("path", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("job_id", String, ForeignKey("jobs.id")),
    Column("created_at", Integer, nullable=False),
    Column("source", String, nullable=False, server_default="job"),
    _organization(),
)

# Adapters that are not served any more and whose folder is to be removed when nothing needs it.
deleted_adapters = _table(
    "deleted_adapters",
    Column("int_id", Integer, nullable=False),
    Column("path", String, nullable=False),
    Column("job_id", String),
    # The job itself has let go of it, so that it needs no more than the state of its training.
    Column("by_job", Boolean, nullable=False),
    Column("deleted_at", Integer, nullable=False),
)

# ``number`` of a checkpoint is its optimizer step.
checkpoints = _table(
    "checkpoints",
    Column("id", String, nullable=False, unique=True),
    Column("job_id", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("name", String, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("created_at", Integer, nullable=False),
)
Index("checkpoints_of_job", checkpoints.c.job_id, checkpoints.c.number, unique=True)

merges = _table(
    "merges",
    Column("id", String, nullable=False, unique=True),
    Column("name", String, nullable=False, unique=True),
    Column("status", String, nullable=False, index=True),
    Column("request", JSON, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("created_at", Integer, nullable=False),
    Column("finished_at", Integer),
    Column("attempts", Integer, nullable=False, default=0),
    Column("claimed_by", String),
    Column("claimed_until", Integer),
    _organization(),
)

webhook_endpoints = _table(
    "webhook_endpoints",
    Column("id", String, nullable=False, unique=True),
    Column("name", String, nullable=False),
    Column("url", String, nullable=False),
    Column("event_types", JSON, nullable=False),
    # What deliveries are signed with: [{"secret", "expires_at" (null for the current one)}].
    Column("secrets", JSON, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("updated_at", Integer, nullable=False),
    _organization(),
)

webhook_deliveries = _table(
    "webhook_deliveries",
    Column("id", String, nullable=False, unique=True),
    Column(
        "endpoint_id",
        String,
        ForeignKey("webhook_endpoints.id", ondelete="CASCADE"),
        nullable=False,
    ),
    Column("event_type", String, nullable=False),
    Column("body", JSON, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", Integer),  # null: delivered or given up
    Column("delivered_at", Integer),
    Column("last_error", String),
    Column("claimed_by", String),
    Column("claimed_until", Integer),
)
Index("deliveries_due", webhook_deliveries.c.next_attempt_at)
Index("deliveries_of_endpoint", webhook_deliveries.c.endpoint_id)

# Where the metrics of a job are sent: TensorBoard files, experiment trackers. ``position`` is the
# ``seq`` of the last event that is there.
trackers = _table(
    "trackers",
    Column("job_id", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("kind", String, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("position", Integer, nullable=False, server_default="0"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("next_attempt_at", Integer),  # null: complete or given up
    Column("last_error", String),
    Column("claimed_by", String),
    Column("claimed_until", Integer),
)
Index("trackers_of_job", trackers.c.job_id, trackers.c.kind, unique=True)
Index("trackers_due", trackers.c.next_attempt_at)

idempotency_keys = _table(
    "idempotency_keys",
    Column("key", String, nullable=False),
    Column("route", String, nullable=False),
    Column("request_hash", String, nullable=False),
    Column("object_id", String, nullable=False),
    Column("created_at", Integer, nullable=False),
    _organization(),
)
Index(
    "idempotency_key_once",
    idempotency_keys.c.organization_id,
    idempotency_keys.c.route,
    idempotency_keys.c.key,
    unique=True,
)
