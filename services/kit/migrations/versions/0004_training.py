"""Trainings with their history and checkpoints, transcoders, and their evaluations."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0004_training"
down_revision = "0003_extraction"

_UP = """
CREATE TABLE trainings (
    job_id text PRIMARY KEY,
    model_id varchar(255) NOT NULL,
    layers integer[] NOT NULL,
    dataset_id varchar(255),     -- where the cache is to be extracted first
    cache_id varchar(255),       -- known from the start, or once it was extracted
    plan jsonb NOT NULL,         -- what is trained, with every default resolved that can be
    finalize_id varchar(255),    -- checkpoint that transcoders are to be made from, instead of training on
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX idx_trainings_created_at ON trainings (created_at DESC, job_id DESC);
CREATE INDEX idx_trainings_model ON trainings (model_id, created_at DESC);

CREATE TABLE training_checkpoints (
    id varchar(255) PRIMARY KEY,
    job_id text NOT NULL REFERENCES trainings ON DELETE CASCADE,
    fence bigint NOT NULL,       -- of the claim that wrote it
    step bigint NOT NULL,
    tokens_seen bigint NOT NULL,
    fvu double precision NOT NULL,
    artifact_uri varchar(1000) NOT NULL,
    size_bytes bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (job_id, step)
);
CREATE INDEX idx_training_checkpoints_artifact ON training_checkpoints (artifact_uri);

CREATE TABLE training_points (
    job_id text NOT NULL REFERENCES trainings ON DELETE CASCADE,
    step bigint NOT NULL,
    figures jsonb NOT NULL,
    PRIMARY KEY (job_id, step)
);

CREATE TABLE transcoders (
    id varchar(255) PRIMARY KEY,
    name varchar(500) NOT NULL,
    model_id varchar(255) NOT NULL,
    layer integer NOT NULL,
    source_hook_point varchar(255) NOT NULL,
    target_hook_point varchar(255) NOT NULL,
    job_id text NOT NULL,
    coder text NOT NULL,         -- its name within the job
    d_in integer NOT NULL,
    d_out integer NOT NULL,
    dict_size integer NOT NULL,
    group_sizes integer[] NOT NULL,
    top_k integer NOT NULL,
    activation varchar(50) NOT NULL CHECK (activation IN ('topk', 'batch_topk', 'jumprelu')),
    artifact_uri varchar(1000) NOT NULL,
    size_bytes bigint NOT NULL,
    base_digest varchar(255) NOT NULL,
    tokens_seen bigint NOT NULL,
    train_fvu double precision NOT NULL,
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (job_id, coder)
);
CREATE INDEX idx_transcoders_created_at ON transcoders (created_at DESC, id DESC);
CREATE INDEX idx_transcoders_model ON transcoders (model_id, layer);
CREATE INDEX idx_transcoders_artifact ON transcoders (artifact_uri);

CREATE TABLE evaluations (
    id varchar(255) PRIMARY KEY,
    job_id text NOT NULL UNIQUE,
    transcoder_id varchar(255) NOT NULL REFERENCES transcoders ON DELETE CASCADE,
    dataset_id varchar(255) NOT NULL,
    options jsonb NOT NULL,
    figures jsonb,               -- what was found; none until it has ended well
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
);
CREATE INDEX idx_evaluations_transcoder ON evaluations (transcoder_id, created_at DESC, id DESC);
"""

_DOWN = """
DROP TABLE evaluations;
DROP TABLE transcoders;
DROP TABLE training_points;
DROP TABLE training_checkpoints;
DROP TABLE trainings;
"""


def upgrade() -> None:
    """Create the tables of training."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them."""
    run_script(_DOWN)
