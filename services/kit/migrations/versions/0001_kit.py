"""Jobs, events, artifacts, idempotent requests and the audit log."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0001_kit"
down_revision = None

_UP = """
CREATE TABLE jobs (
    id text PRIMARY KEY,
    kind text NOT NULL,
    state text NOT NULL DEFAULT 'queued' CHECK (
        state IN ('queued', 'running', 'finalizing', 'paused', 'completed', 'failed', 'cancelled')),
    device text,
    priority integer NOT NULL DEFAULT 0,
    payload jsonb NOT NULL,
    progress double precision NOT NULL DEFAULT 0 CHECK (progress BETWEEN 0 AND 100),
    detail jsonb NOT NULL DEFAULT '{}',
    result jsonb NOT NULL DEFAULT '{}',
    fence bigint NOT NULL DEFAULT 0,
    attempt integer NOT NULL DEFAULT 0,
    owner text,
    lease_until timestamptz,
    run_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    cancel_requested boolean NOT NULL DEFAULT false,
    pause_requested boolean NOT NULL DEFAULT false,
    waiting_for text,
    error_code text,
    error_message text,
    resource_id text NOT NULL,
    event_prefix text NOT NULL,
    event_data jsonb NOT NULL DEFAULT '{}',
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,
    finished_at timestamptz,
    CHECK ((owner IS NOT NULL AND lease_until IS NOT NULL) = (state IN ('running', 'finalizing')))
);
CREATE INDEX jobs_queued ON jobs (kind, priority DESC, run_at, created_at, id) WHERE state = 'queued';
CREATE INDEX jobs_leased ON jobs (lease_until) WHERE state IN ('running', 'finalizing');
CREATE INDEX jobs_resource ON jobs (resource_id);
CREATE INDEX jobs_created ON jobs (created_at DESC, id DESC);

CREATE TABLE job_workers (
    incarnation text PRIMARY KEY,
    device text NOT NULL,
    kinds text[] NOT NULL,
    limits jsonb NOT NULL,
    slots integer NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Every column of jobs, with what a queued job waits for in words.
CREATE VIEW jobs_explained AS
SELECT j.id, j.kind, j.state, j.device, j.priority, j.payload, j.progress, j.detail, j.result, j.fence, j.attempt,
       j.owner, j.lease_until, j.run_at, j.cancel_requested, j.pause_requested,
       CASE
           WHEN j.state <> 'queued' THEN j.waiting_for
           WHEN j.run_at > clock_timestamp()
               THEN 'the next attempt at ' || to_char(j.run_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
           WHEN coalesce(w.workers, 0) = 0
               THEN 'a worker for ' || j.kind || coalesce(' on ' || j.device, '')
           WHEN r.running >= w.running_limit
               THEN 'the end of one of ' || r.running || ' running ' || j.kind || ' jobs'
           ELSE 'a free worker'
       END AS waiting_for,
       j.error_code, j.error_message, j.resource_id, j.event_prefix, j.event_data, j.created_by, j.created_at,
       j.started_at, j.finished_at
FROM jobs j
LEFT JOIN LATERAL (
    SELECT count(*) AS workers, min((limits ->> j.kind)::integer) AS running_limit FROM job_workers
    WHERE j.state = 'queued' AND j.kind = ANY (kinds) AND (j.device IS NULL OR j.device = job_workers.device)
      AND seen_at > clock_timestamp() - interval '30 seconds'
) w ON true
LEFT JOIN LATERAL (
    SELECT count(*) AS running FROM jobs o
    WHERE j.state = 'queued' AND o.kind = j.kind AND o.state IN ('running', 'finalizing')
) r ON true;

CREATE TABLE event_streams (
    topic text PRIMARY KEY,
    prefix text NOT NULL,
    last_sequence bigint NOT NULL
);
CREATE INDEX event_streams_prefix ON event_streams (prefix);

CREATE TABLE events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL,
    sequence bigint NOT NULL,
    event text NOT NULL,
    resource_id text NOT NULL,
    data jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    relayed_at timestamptz,
    UNIQUE (topic, sequence)
);
CREATE INDEX events_outbox ON events (id) WHERE relayed_at IS NULL;
CREATE INDEX events_age ON events (created_at);

-- One row per copy: hosts without a common file system each have a store of their own.
CREATE TABLE artifacts (
    uri text NOT NULL,
    store_id text NOT NULL,
    kind text NOT NULL,
    digest text NOT NULL,
    size_bytes bigint NOT NULL CHECK (size_bytes >= 0),
    meta jsonb NOT NULL DEFAULT '{}',
    state text NOT NULL DEFAULT 'ready' CHECK (state IN ('ready', 'deleting', 'lost')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (uri, store_id)
);
CREATE INDEX artifacts_kind ON artifacts (store_id, kind, used_at);

CREATE TABLE artifact_leases (
    id text PRIMARY KEY,
    uri text NOT NULL,
    store_id text NOT NULL,
    expires_at timestamptz NOT NULL,
    FOREIGN KEY (uri, store_id) REFERENCES artifacts ON DELETE CASCADE
);
CREATE INDEX artifact_leases_uri ON artifact_leases (uri, store_id);

CREATE TABLE idempotent_requests (
    caller text NOT NULL,
    method text NOT NULL,
    request_id text NOT NULL,
    digest bytea NOT NULL,
    answer jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (caller, method, request_id)
);
CREATE INDEX idempotent_requests_age ON idempotent_requests (created_at);

CREATE TABLE audit_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    caller text NOT NULL,
    method text NOT NULL,
    resource text NOT NULL,
    outcome text NOT NULL,
    trace text NOT NULL
);
CREATE INDEX audit_log_age ON audit_log (at);
"""

_DOWN = """
DROP TABLE audit_log;
DROP TABLE idempotent_requests;
DROP TABLE artifact_leases;
DROP TABLE artifacts;
DROP TABLE events;
DROP TABLE event_streams;
DROP VIEW jobs_explained;
DROP TABLE job_workers;
DROP TABLE jobs;
"""


def upgrade() -> None:
    """Create the kit's tables."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them."""
    run_script(_DOWN)
