"""Tenants, checkpoints, uploads in parts, webhooks, imported and merged adapters."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """From the tables of release 0.1."""
    with op.batch_alter_table("files") as files:
        files.add_column(sa.Column("expires_at", sa.Integer))
        files.add_column(_organization())
    op.create_index("ix_files_organization_id", "files", ["organization_id"])
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("validation_file", sa.String))
        jobs.add_column(sa.Column("result_file", sa.String))
        jobs.add_column(sa.Column("method", sa.String, nullable=False, server_default="supervised"))
        jobs.add_column(sa.Column("integrations", sa.JSON(none_as_null=True)))
        jobs.add_column(sa.Column("first_step", sa.Integer, nullable=False, server_default="0"))
        jobs.add_column(
            sa.Column("pause_requested", sa.Boolean, nullable=False, server_default="0")
        )
        jobs.alter_column("organization_id", server_default="local")
    op.create_index("ix_jobs_validation_file", "jobs", ["validation_file"])
    op.create_index("ix_jobs_organization_id", "jobs", ["organization_id"])
    with op.batch_alter_table("events") as events:
        events.add_column(sa.Column("key", sa.String))
    op.create_index("events_once", "events", ["job_id", "key"], unique=True)
    with op.batch_alter_table("adapters") as adapters:
        adapters.alter_column("job_id", existing_type=sa.String, nullable=True)
        adapters.add_column(sa.Column("source", sa.String, nullable=False, server_default="job"))
        adapters.add_column(_organization())
    op.create_index("ix_adapters_organization_id", "adapters", ["organization_id"])
    _create(
        "deleted_adapters",
        _number("int_id"),
        _text("path"),
        sa.Column("job_id", sa.String),
        sa.Column("by_job", sa.Boolean, nullable=False),
        _number("deleted_at"),
    )
    _create(
        "checkpoints",
        _text("id", unique=True),
        sa.Column(
            "job_id", sa.String, sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False
        ),
        _number("number"),
        _text("name"),
        sa.Column("metrics", sa.JSON, nullable=False),
        _number("created_at"),
    )
    op.create_index("checkpoints_of_job", "checkpoints", ["job_id", "number"], unique=True)
    _create(
        "uploads",
        _text("id", unique=True),
        _text("filename"),
        _number("bytes"),
        _text("purpose"),
        _text("mime_type"),
        _text("status"),
        _number("created_at"),
        _number("expires_at"),
        sa.Column("file_id", sa.String),
        sa.Column("file_expires_after_s", sa.Integer),
        _organization(index=True),
    )
    _create(
        "upload_parts",
        _text("id", unique=True),
        sa.Column(
            "upload_id", sa.String, sa.ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False
        ),
        _number("bytes"),
        _number("created_at"),
    )
    op.create_index("parts_of_upload", "upload_parts", ["upload_id"])
    _create(
        "merges",
        _text("id", unique=True),
        _text("name", unique=True),
        _text("status", index=True),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True)),
        _number("created_at"),
        sa.Column("finished_at", sa.Integer),
        _number("attempts"),
        sa.Column("claimed_by", sa.String),
        sa.Column("claimed_until", sa.Integer),
        _organization(index=True),
    )
    _create(
        "webhook_endpoints",
        _text("id", unique=True),
        _text("name"),
        _text("url"),
        sa.Column("event_types", sa.JSON, nullable=False),
        sa.Column("secrets", sa.JSON, nullable=False),
        _number("created_at"),
        _number("updated_at"),
        _organization(index=True),
    )
    _create(
        "webhook_deliveries",
        _text("id", unique=True),
        sa.Column(
            "endpoint_id",
            sa.String,
            sa.ForeignKey("webhook_endpoints.id", ondelete="CASCADE"),
            nullable=False,
        ),
        _text("event_type"),
        sa.Column("body", sa.JSON, nullable=False),
        _number("created_at"),
        _number("attempts"),
        sa.Column("next_attempt_at", sa.Integer),
        sa.Column("delivered_at", sa.Integer),
        sa.Column("last_error", sa.String),
        sa.Column("claimed_by", sa.String),
        sa.Column("claimed_until", sa.Integer),
    )
    op.create_index("deliveries_due", "webhook_deliveries", ["next_attempt_at"])
    op.create_index("deliveries_of_endpoint", "webhook_deliveries", ["endpoint_id"])
    _create(
        "idempotency_keys",
        _text("key"),
        _text("route"),
        _text("request_hash"),
        _text("object_id"),
        _number("created_at"),
        _organization(index=True),
    )
    op.create_index(
        "idempotency_key_once",
        "idempotency_keys",
        ["organization_id", "route", "key"],
        unique=True,
    )


def _create(name: str, *columns: Any) -> None:
    seq = sa.Column("seq", sa.Integer, primary_key=True)
    op.create_table(name, seq, *columns, sqlite_autoincrement=True)


def _text(name: str, **options: Any) -> Any:
    return sa.Column(name, sa.String, nullable=False, **options)


def _number(name: str) -> Any:
    return sa.Column(name, sa.Integer, nullable=False)


def _organization(**options: Any) -> Any:
    """``index`` works for a new table only; one that is altered gets its index apart."""
    return sa.Column(
        "organization_id", sa.String, nullable=False, server_default="local", **options
    )
