"""A study's evaluation by a name of its own: it was the path of a module, which moved."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NAMES = {"nas.train:evaluate": "training", "nas.trivial:evaluate": "trivial"}


def upgrade() -> None:
    studies = sa.table("studies", sa.column("id", sa.Integer), sa.column("settings", sa.JSON))
    connection = op.get_bind()
    for study, settings in connection.execute(sa.select(studies.c.id, studies.c.settings)).all():
        name = NAMES.get(settings.get("evaluate"))
        if name is not None:
            renamed = settings | {"evaluate": name}
            connection.execute(studies.update().where(studies.c.id == study).values(settings=renamed))
