"""Extensions of models, the versions of their files, and the trainings that made them."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0005_extensions"
down_revision = "0004_training"

_UP = """
CREATE TABLE extensions (
    id varchar(255) PRIMARY KEY,
    model_id varchar(255) NOT NULL REFERENCES models,
    task_name varchar(63) NOT NULL,
    kind varchar(20) NOT NULL CHECK (kind IN ('lora', 'layer', 'hybrid')),
    lora jsonb,
    layers jsonb NOT NULL DEFAULT '[]',
    parameter_counts jsonb NOT NULL,
    base_digest varchar(255) NOT NULL,
    version integer NOT NULL DEFAULT 1,
    trained_steps bigint NOT NULL DEFAULT 0,
    loss_before double precision,
    loss_after double precision,
    job_id text,
    created_by varchar(255) NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX extensions_model ON extensions (model_id);
CREATE INDEX extensions_created ON extensions (created_at DESC, id DESC);

-- Files are never changed: each training makes a version, and lenses may hold on to an older one.
CREATE TABLE extension_versions (
    extension_id varchar(255) NOT NULL REFERENCES extensions ON DELETE CASCADE,
    version integer NOT NULL,
    artifact_uri text NOT NULL,
    digest varchar(255) NOT NULL,
    size_bytes bigint NOT NULL CHECK (size_bytes >= 0),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (extension_id, version)
);
CREATE INDEX extension_versions_artifact ON extension_versions (artifact_uri);

CREATE TABLE extension_trainings (
    job_id text PRIMARY KEY,
    extension_id varchar(255) NOT NULL REFERENCES extensions ON DELETE CASCADE,
    artifact_uri text NOT NULL,
    checkpoint_uri text,
    loss_before double precision,
    result jsonb
);
CREATE INDEX extension_trainings_extension ON extension_trainings (extension_id);
"""

_DOWN = """
DROP TABLE extension_trainings;
DROP TABLE extension_versions;
DROP TABLE extensions;
"""


def upgrade() -> None:
    """Create the tables."""
    run_script(_UP)


def downgrade() -> None:
    """Drop the tables."""
    run_script(_DOWN)
