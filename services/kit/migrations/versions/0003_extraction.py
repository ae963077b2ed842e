"""Extractions, their finished units, and activation caches."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0003_extraction"
down_revision = "0002_registry"

_UP = """
CREATE TABLE activation_cache (
    id varchar(255) PRIMARY KEY,
    model_id varchar(255) NOT NULL,
    dataset_id varchar(255) NOT NULL,
    layer_indices integer[] NOT NULL,
    sample_count bigint NOT NULL,
    storage_uri varchar(1000) NOT NULL UNIQUE,
    file_size_bytes bigint NOT NULL CHECK (file_size_bytes >= 0),
    extraction_time_seconds double precision NOT NULL,
    activation_shape bigint[] NOT NULL,
    content_key text NOT NULL,   -- digest of all that decides the content, hook points left out
    hook_points text[] NOT NULL,
    manifest jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_accessed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX idx_activation_cache_model ON activation_cache (model_id);
CREATE INDEX idx_activation_cache_dataset ON activation_cache (dataset_id);
CREATE INDEX idx_activation_cache_created_at ON activation_cache (created_at DESC, id DESC);
CREATE INDEX idx_activation_cache_last_accessed_at ON activation_cache (last_accessed_at);
CREATE INDEX idx_activation_cache_key ON activation_cache (content_key);

CREATE TABLE extractions (
    id varchar(255) PRIMARY KEY,
    job_id text,                 -- none where a cache answered at once
    model_id varchar(255) NOT NULL,
    dataset_id varchar(255) NOT NULL,
    options jsonb NOT NULL,
    content_key text NOT NULL,
    hook_points text[] NOT NULL,
    estimated_seconds double precision NOT NULL,
    total_samples bigint NOT NULL,
    plan_digest text,            -- of the plan that the units belong to
    cache_id varchar(255) REFERENCES activation_cache ON DELETE SET NULL,
    reused boolean NOT NULL DEFAULT false,
    tokens bigint NOT NULL DEFAULT 0,
    seconds double precision,
    tokens_per_second double precision,
    identity_error double precision,
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
);
CREATE INDEX idx_extractions_model ON extractions (model_id, created_at DESC);
CREATE INDEX idx_extractions_created_at ON extractions (created_at DESC, id DESC);
CREATE UNIQUE INDEX idx_extractions_job ON extractions (job_id);

CREATE TABLE extraction_units (
    extraction_id varchar(255) NOT NULL REFERENCES extractions ON DELETE CASCADE,
    unit integer NOT NULL,
    store_id text NOT NULL,      -- the host's artifact store beside which the files lie
    fence bigint NOT NULL,       -- part of the files' names
    size_bytes bigint NOT NULL,
    digest text NOT NULL,
    PRIMARY KEY (extraction_id, unit)
);

-- Every extraction as clients see it: what runs is told by its job.
CREATE VIEW extractions_explained AS
SELECT e.id, e.job_id, e.model_id, e.dataset_id, e.hook_points, e.total_samples, e.cache_id, e.reused,
       e.estimated_seconds, e.seconds, e.tokens_per_second, e.identity_error, e.created_by, e.created_at,
       c.storage_uri, c.file_size_bytes AS size_bytes, c.activation_shape,
       coalesce(e.finished_at, j.finished_at) AS finished_at,
       CASE WHEN e.finished_at IS NOT NULL THEN e.tokens
            ELSE coalesce((j.detail ->> 'tokens')::bigint, 0) END AS tokens,
       CASE WHEN e.finished_at IS NOT NULL THEN e.total_samples
            ELSE coalesce((j.detail ->> 'samples_processed')::bigint, 0) END AS samples_processed,
       CASE WHEN e.finished_at IS NOT NULL THEN 'completed'
            WHEN j.state IN ('running', 'finalizing') THEN 'extracting'
            ELSE j.state END AS status,
       CASE WHEN e.finished_at IS NOT NULL THEN 100 ELSE j.progress END AS progress,
       CASE WHEN e.finished_at IS NULL THEN j.waiting_for END AS waiting_for,
       CASE WHEN e.finished_at IS NULL THEN j.error_code END AS error_code,
       CASE WHEN e.finished_at IS NULL THEN j.error_message END AS error_message
FROM extractions e
LEFT JOIN jobs_explained j ON j.id = e.job_id
LEFT JOIN activation_cache c ON c.id = e.cache_id;
"""

_DOWN = """
DROP VIEW extractions_explained;
DROP TABLE extraction_units;
DROP TABLE extractions;
DROP TABLE activation_cache;
"""


def upgrade() -> None:
    """Create the tables of extraction."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them."""
    run_script(_DOWN)
