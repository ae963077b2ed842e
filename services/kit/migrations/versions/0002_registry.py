"""The registry's catalogue, its ledger of device bytes, and the history that estimates are corrected from."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0002_registry"
down_revision = "0001_kit"

_UP = """
CREATE TABLE models (
    id varchar(255) PRIMARY KEY,
    name varchar(500) NOT NULL,
    model_type varchar(100) NOT NULL,
    architecture varchar(100),
    source varchar(50) NOT NULL CHECK (source IN ('huggingface', 'local', 'custom')),
    model_identifier varchar(500) NOT NULL,
    revision varchar(200),
    config jsonb NOT NULL DEFAULT '{}',
    quantization varchar(50) NOT NULL DEFAULT 'none' CHECK (quantization IN ('none', 'fp16', 'bf16', 'int8', 'int4')),
    status varchar(50) NOT NULL DEFAULT 'pending',
    progress double precision NOT NULL DEFAULT 0 CHECK (progress BETWEEN 0 AND 100),
    memory_usage_bytes bigint,
    load_time_seconds double precision,
    estimated_memory_bytes bigint,
    estimated_load_seconds double precision,
    parameter_count bigint,
    hidden_size integer,
    num_layers integer,
    vocab_size integer,
    context_length integer,
    file_bytes bigint,
    digest varchar(255),
    defaults jsonb,
    perplexities jsonb NOT NULL DEFAULT '[]',
    cache_dir varchar(1000),   -- hub models: name of its directory in the hub cache
    model_path varchar(1000),  -- local models: path below a model root
    error_code varchar(100),
    error_message text,
    fingerprint varchar(255),
    fell_back_to_cpu boolean NOT NULL DEFAULT false,
    pinned boolean NOT NULL DEFAULT false,
    preload boolean NOT NULL DEFAULT false,
    wanted boolean NOT NULL DEFAULT false,  -- desired state: whether it should be on a device
    version bigint NOT NULL DEFAULT 1,
    created_by varchar(255) NOT NULL,
    created_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
    loaded_at timestamptz,
    last_used_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CONSTRAINT models_status_check CHECK (status IN ('pending', 'loading', 'ready', 'failed', 'unloaded'))
);
CREATE INDEX idx_models_status ON models (status);
CREATE INDEX idx_models_model_type ON models (model_type);
CREATE INDEX idx_models_source ON models (source);
CREATE INDEX idx_models_created_at ON models (created_at DESC, id DESC);
CREATE INDEX idx_models_last_used_at ON models (last_used_at DESC);
CREATE INDEX idx_models_ready ON models (status, model_type) WHERE status = 'ready';

CREATE TABLE datasets (
    id varchar(255) PRIMARY KEY,
    name varchar(500) NOT NULL,
    source varchar(50) NOT NULL CHECK (source IN ('huggingface', 'local', 'inline')),
    identifier varchar(500) NOT NULL,
    split varchar(100) NOT NULL,
    text_field varchar(200) NOT NULL,
    prompt_field varchar(200),
    target_field varchar(200),
    size_bytes bigint NOT NULL CHECK (size_bytes >= 0),
    rows bigint,
    digest varchar(255),
    created_by varchar(255) NOT NULL,
    created_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX datasets_created ON datasets (created_at DESC, id DESC);

CREATE TABLE dataset_texts (
    dataset_id varchar(255) NOT NULL REFERENCES datasets ON DELETE CASCADE,
    ordinal integer NOT NULL,
    text text NOT NULL,
    PRIMARY KEY (dataset_id, ordinal)
);

CREATE TABLE hosts (
    host_id varchar(255) PRIMARY KEY,
    incarnation varchar(255) NOT NULL,
    address varchar(255) NOT NULL,
    device varchar(50) NOT NULL,
    kind varchar(200) NOT NULL,
    total_bytes bigint NOT NULL CHECK (total_bytes >= 0),
    budget_bytes bigint NOT NULL CHECK (budget_bytes >= 0),
    measured_bytes bigint NOT NULL DEFAULT 0,
    services text[] NOT NULL,
    temperature_celsius double precision,
    utilization_ratio double precision,
    lost boolean NOT NULL DEFAULT false,
    registered_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- A model in a host process. `charge_bytes` is what the ledger counts: measured bytes once resident; while it loads,
-- what it needs less what the models it displaces still hold, so that the sum is right at every moment.
CREATE TABLE residencies (
    model_id varchar(255) NOT NULL REFERENCES models ON DELETE CASCADE,
    host_id varchar(255) NOT NULL REFERENCES hosts ON DELETE CASCADE,
    state varchar(20) NOT NULL CHECK (state IN ('loading', 'resident', 'unloading', 'lost')),
    quantization varchar(50) NOT NULL,
    required_bytes bigint NOT NULL CHECK (required_bytes >= 0),
    charge_bytes bigint NOT NULL CHECK (charge_bytes >= 0),
    job_id text,
    leases integer NOT NULL DEFAULT 0,
    active_lens_id varchar(255),
    loaded_at timestamptz,
    last_used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (model_id, host_id)
);
CREATE INDEX residencies_host ON residencies (host_id);
CREATE INDEX residencies_job ON residencies (job_id) WHERE state = 'loading';

CREATE TABLE reservations (
    host_id varchar(255) NOT NULL REFERENCES hosts ON DELETE CASCADE,
    owner varchar(255) NOT NULL,
    bytes bigint NOT NULL CHECK (bytes >= 0),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (host_id, owner)
);

-- The bits that a model's fixed-input forward gave in one life of a process.
CREATE TABLE fingerprints (
    model_id varchar(255) NOT NULL REFERENCES models ON DELETE CASCADE,
    host_id varchar(255) NOT NULL REFERENCES hosts ON DELETE CASCADE,
    quantization varchar(50) NOT NULL,
    incarnation varchar(255) NOT NULL,
    fingerprint varchar(255) NOT NULL,
    PRIMARY KEY (model_id, host_id, quantization)
);

CREATE TABLE groups (
    id varchar(255) PRIMARY KEY,
    name varchar(500) NOT NULL,
    model_id varchar(255) NOT NULL REFERENCES models,
    active_lens_id varchar(255),
    created_by varchar(255) NOT NULL,
    created_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX groups_model ON groups (model_id);
CREATE INDEX groups_created ON groups (created_at DESC, id DESC);

CREATE TABLE lenses (
    id varchar(255) PRIMARY KEY,
    group_id varchar(255) NOT NULL REFERENCES groups ON DELETE CASCADE,
    kind varchar(50) NOT NULL CHECK (kind IN ('transcoder', 'extension', 'logit_lens', 'tuned_lens', 'text_lens')),
    transcoder_id varchar(255),
    extension_id varchar(255),
    artifact_uri varchar(500),
    activation_source_model_id varchar(255) REFERENCES models,
    base_digest varchar(255),
    layer integer,
    size_bytes bigint NOT NULL DEFAULT 0 CHECK (size_bytes >= 0),
    error_code varchar(100),
    error_message text,
    created_by varchar(255) NOT NULL,
    created_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX lenses_group ON lenses (group_id, created_at);
CREATE INDEX lenses_transcoder ON lenses (transcoder_id) WHERE transcoder_id IS NOT NULL;
CREATE INDEX lenses_extension ON lenses (extension_id) WHERE extension_id IS NOT NULL;

-- A lens on a device. An extension that is activated without a group is its own lens, so `lens_id` may name one.
CREATE TABLE lens_residencies (
    lens_id varchar(255) NOT NULL,
    model_id varchar(255) NOT NULL,
    host_id varchar(255) NOT NULL,
    charge_bytes bigint NOT NULL CHECK (charge_bytes >= 0),
    PRIMARY KEY (lens_id, host_id),
    FOREIGN KEY (model_id, host_id) REFERENCES residencies ON DELETE CASCADE
);
CREATE INDEX lens_residencies_model ON lens_residencies (model_id, host_id);

CREATE TABLE loads (
    id text PRIMARY KEY,
    model_id varchar(255) NOT NULL,
    host_id varchar(255) NOT NULL,
    quantization varchar(50) NOT NULL,
    cause varchar(20) NOT NULL CHECK (cause IN ('user', 'service', 'preload', 'restore')),
    created_by varchar(255) NOT NULL,
    required_bytes bigint NOT NULL,
    memory_bytes bigint,
    seconds double precision,
    outcome varchar(20) NOT NULL DEFAULT 'running' CHECK (outcome IN ('running', 'ready', 'failed', 'cancelled')),
    error_code varchar(100),
    error_message text,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX loads_user ON loads (created_by, started_at) WHERE cause = 'user';
CREATE INDEX loads_model ON loads (model_id, quantization, started_at DESC) WHERE outcome = 'ready';

CREATE INDEX loads_running ON loads (id) WHERE outcome = 'running';

CREATE TABLE switches (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    group_id varchar(255) NOT NULL REFERENCES groups ON DELETE CASCADE,
    kind varchar(20) NOT NULL CHECK (kind IN ('within', 'cross')),
    seconds double precision NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX switches_group ON switches (group_id, kind, id DESC);

-- A model's row with the device that serves it, its oldest copy on a live host, and its last use on any.
CREATE VIEW models_placed AS
SELECT m.*, r.host_id, r.device, u.used_at
FROM models m
LEFT JOIN LATERAL (
    SELECT h.host_id, h.host_id || '/' || h.device AS device
    FROM residencies JOIN hosts h USING (host_id)
    WHERE model_id = m.id AND state = 'resident' AND NOT h.lost
    ORDER BY loaded_at, host_id LIMIT 1
) r ON true
LEFT JOIN LATERAL (SELECT max(last_used_at) AS used_at FROM residencies WHERE model_id = m.id AND state = 'resident') u
ON true;

-- A device with what its ledger counts.
CREATE VIEW hosts_counted AS
SELECT h.*, h.host_id || '/' || h.device AS name,
       coalesce(r.used, 0) + coalesce(l.used, 0) AS used_bytes,
       coalesce(r.loading, 0) + coalesce(v.reserved, 0) AS reserved_bytes,
       extract(epoch FROM clock_timestamp() - h.heartbeat_at)::float8 AS silent_seconds
FROM hosts h
LEFT JOIN LATERAL (
    SELECT sum(charge_bytes) FILTER (WHERE state IN ('resident', 'unloading'))::bigint AS used,
           sum(charge_bytes) FILTER (WHERE state = 'loading')::bigint AS loading
    FROM residencies WHERE host_id = h.host_id
) r ON true
LEFT JOIN LATERAL (
    SELECT sum(c.charge_bytes)::bigint AS used FROM lens_residencies c
    JOIN residencies USING (model_id, host_id) WHERE c.host_id = h.host_id AND state <> 'lost'
) l ON true
LEFT JOIN LATERAL (SELECT sum(bytes)::bigint AS reserved FROM reservations WHERE host_id = h.host_id) v ON true;
"""

_DOWN = """
DROP VIEW hosts_counted;
DROP VIEW models_placed;
DROP TABLE switches;
DROP TABLE loads;
DROP TABLE lens_residencies;
DROP TABLE lenses;
DROP TABLE groups;
DROP TABLE fingerprints;
DROP TABLE reservations;
DROP TABLE residencies;
DROP TABLE hosts;
DROP TABLE dataset_texts;
DROP TABLE datasets;
DROP TABLE models;
"""


def upgrade() -> None:
    """Create the registry's tables."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them."""
    run_script(_DOWN)
