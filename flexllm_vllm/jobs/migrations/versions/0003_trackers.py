"""Experiment trackers."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """From the tables of 0002. Jobs that are there have no trackers."""
    op.create_table(
        "trackers",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column(
            "job_id", sa.String, sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("position", sa.Integer, nullable=False, server_default="0"),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("next_attempt_at", sa.Integer),
        sa.Column("last_error", sa.String),
        sa.Column("claimed_by", sa.String),
        sa.Column("claimed_until", sa.Integer),
        sqlite_autoincrement=True,
    )
    op.create_index("trackers_of_job", "trackers", ["job_id", "kind"], unique=True)
    op.create_index("trackers_due", "trackers", ["next_attempt_at"])
