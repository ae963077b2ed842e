"""Groups that want a device alone, switches side by side on several devices, and what users switch to after what."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0014_groups"
down_revision = "0013b_extraction_shares"

_UP = """
ALTER TABLE jobs ADD COLUMN lane text;  -- of the jobs of a kind and a lane one runs at a time
ALTER TABLE groups ADD COLUMN exclusive boolean NOT NULL DEFAULT false;
ALTER TABLE residencies ADD COLUMN cause varchar(30);  -- why it leaves, while it does

-- How often a user went from one lens to another; an empty lens is the base alone.
CREATE TABLE habits (
    subject varchar(255) NOT NULL,
    from_group_id varchar(255) NOT NULL REFERENCES groups ON DELETE CASCADE,
    from_lens_id varchar(255) NOT NULL,
    to_group_id varchar(255) NOT NULL REFERENCES groups ON DELETE CASCADE,
    to_lens_id varchar(255) NOT NULL,
    times bigint NOT NULL DEFAULT 1,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (subject, from_group_id, from_lens_id, to_group_id, to_lens_id)
);
CREATE INDEX habits_of_all ON habits (from_group_id, from_lens_id);
"""

_DOWN = """
DROP TABLE habits;
ALTER TABLE residencies DROP COLUMN cause;
ALTER TABLE groups DROP COLUMN exclusive;
ALTER TABLE jobs DROP COLUMN lane;
"""


def upgrade() -> None:
    """Add the columns and tables."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them."""
    run_script(_DOWN)
