"""A driver's machine, by boot and namespace of process ids, and that machine's clock at its last heartbeat.

`process_started` is in clock ticks since boot from here on, where it was the time of day. A row that names no boot is
judged by its heartbeats.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("drivers", sa.Column("boot", sa.Text(), nullable=True))
    op.add_column("drivers", sa.Column("pid_namespace", sa.Text(), nullable=True))
    op.add_column("drivers", sa.Column("uptime", sa.Double(), nullable=True))
