"""Extensions that share layers, and extensions whose base is trained with them."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0009_extensions_shared"
down_revision = "0008_parking"

_UP = """
-- An extension whose first owner was deleted still shares its layers with the others that name it.
ALTER TABLE extensions
    ADD COLUMN freeze_base boolean NOT NULL DEFAULT true,
    ADD COLUMN shared_layer_of varchar(255) NOT NULL DEFAULT '',
    ADD COLUMN train_shared_layer boolean NOT NULL DEFAULT false;
CREATE INDEX extensions_shared ON extensions (shared_layer_of) WHERE shared_layer_of <> '';
"""

_DOWN = """
DROP INDEX extensions_shared;
ALTER TABLE extensions DROP COLUMN freeze_base, DROP COLUMN shared_layer_of, DROP COLUMN train_shared_layer;
"""


def upgrade() -> None:
    """Add the columns."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them."""
    run_script(_DOWN)
