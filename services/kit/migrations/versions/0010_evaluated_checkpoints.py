"""Evaluations of checkpoints beside those of transcoders."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0010_evaluated_checkpoints"
down_revision = "0009_extensions_shared"

_UP = """
-- An evaluation is of a transcoder, or of one coder of a training's checkpoint.
ALTER TABLE evaluations
    ALTER COLUMN transcoder_id DROP NOT NULL,
    ADD COLUMN training_id text REFERENCES trainings ON DELETE CASCADE,
    ADD COLUMN checkpoint_id varchar(255),
    ADD CONSTRAINT evaluations_of_one CHECK (num_nonnulls(transcoder_id, checkpoint_id) = 1);
CREATE INDEX idx_evaluations_training ON evaluations (training_id) WHERE training_id IS NOT NULL;
"""

_DOWN = """
DELETE FROM evaluations WHERE transcoder_id IS NULL;
ALTER TABLE evaluations
    DROP CONSTRAINT evaluations_of_one,
    DROP COLUMN training_id,
    DROP COLUMN checkpoint_id,
    ALTER COLUMN transcoder_id SET NOT NULL;
"""


def upgrade() -> None:
    """Add the columns."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them, and the evaluations of checkpoints."""
    run_script(_DOWN)
