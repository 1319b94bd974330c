"""The tables of release 0.1: they are there."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing: a store without revisions is at this one."""
