-- enqueue --
INSERT INTO jobs (id, kind, payload, created_by, resource_id, event_prefix, event_data, device, priority, lane)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
RETURNING *

-- notify --
SELECT pg_notify('lensmesh_jobs', $1)

-- get --
SELECT * FROM jobs_explained WHERE id = $1

-- lock --
SELECT * FROM jobs WHERE id = $1 FOR UPDATE

-- list --
SELECT * FROM jobs_explained
WHERE ($1::text[] IS NULL OR kind = ANY ($1)) AND ($2::text[] IS NULL OR state = ANY ($2))
  AND ($3::text IS NULL OR resource_id = $3) AND ($4::text IS NULL OR created_by = $4)
  AND ($5::timestamptz IS NULL OR (created_at, id) < ($5, $6::text))
ORDER BY created_at DESC, id DESC LIMIT $7 OFFSET $8

-- count --
SELECT count(*) FROM jobs
WHERE ($1::text[] IS NULL OR kind = ANY ($1)) AND ($2::text[] IS NULL OR state = ANY ($2))
  AND ($3::text IS NULL OR resource_id = $3) AND ($4::text IS NULL OR created_by = $4)

-- lock_limit --
SELECT pg_advisory_xact_lock(hashtextextended('lensmesh_jobs_limit:' || $1, 0))

-- leased --
SELECT kind, count(*) AS jobs FROM jobs WHERE kind = ANY ($1) AND state IN ('running', 'finalizing') GROUP BY kind

-- claim --
-- A job of a kind in $5 is left to a worker that lives, has room and runs fewer of that kind: devices work side by side.
WITH busy AS (
    SELECT owner, kind, count(*) AS jobs FROM jobs WHERE state IN ('running', 'finalizing') GROUP BY owner, kind
), next AS (
    SELECT id FROM jobs j
    WHERE state = 'queued' AND kind = ANY ($1) AND (device IS NULL OR device = $2) AND run_at <= clock_timestamp()
      AND NOT EXISTS (
          SELECT FROM jobs r WHERE r.kind = j.kind AND r.lane = j.lane AND r.state IN ('running', 'finalizing'))
      AND NOT (kind = ANY ($5) AND EXISTS (
          SELECT FROM job_workers w
          WHERE j.kind = ANY (w.kinds) AND (j.device IS NULL OR j.device = w.device)
            AND w.seen_at > clock_timestamp() - $4::interval
            AND (SELECT coalesce(sum(jobs), 0) FROM busy WHERE owner = w.incarnation) < w.slots
            AND (SELECT coalesce(sum(jobs), 0) FROM busy b WHERE b.owner = w.incarnation AND b.kind = j.kind)
              < (SELECT coalesce(sum(jobs), 0) FROM busy b WHERE b.owner = $3 AND b.kind = j.kind)))
    ORDER BY priority DESC, run_at, created_at, id
    FOR UPDATE SKIP LOCKED LIMIT 1
)
UPDATE jobs SET state = 'running', owner = $3, lease_until = clock_timestamp() + $4, fence = fence + 1,
    attempt = attempt + 1, waiting_for = NULL, started_at = coalesce(started_at, clock_timestamp())
FROM next WHERE jobs.id = next.id
RETURNING jobs.*

-- seconds_to_next --
-- From the start of the transaction that found nothing to claim: what has become due since then is not overlooked.
SELECT extract(epoch FROM min(run_at) - clock_timestamp())::float8 FROM jobs
WHERE state = 'queued' AND kind = ANY ($1) AND (device IS NULL OR device = $2) AND run_at > now()

-- lock_leased --
-- The row while its lease is ours; it stays locked until the transaction ends, so nobody can take the job over meanwhile.
SELECT * FROM jobs
WHERE id = $1 AND fence = $2 AND owner = $3 AND state IN ('running', 'finalizing') AND lease_until > clock_timestamp()
FOR UPDATE

-- extend --
UPDATE jobs SET lease_until = clock_timestamp() + $2 WHERE id = $1

-- renew --
-- A row that one of our own commits holds locked is skipped: that lock protects it better than the lease.
UPDATE jobs SET lease_until = clock_timestamp() + $3
WHERE id IN (
    SELECT id FROM jobs
    WHERE id = ANY ($1) AND owner = $2 AND state IN ('running', 'finalizing') AND lease_until > clock_timestamp()
    FOR UPDATE SKIP LOCKED)
RETURNING id

-- leases --
SELECT id, fence, cancel_requested, pause_requested,
    coalesce(owner = $2 AND lease_until > clock_timestamp(), false) AS live
FROM jobs WHERE id = ANY ($1)

-- progress --
UPDATE jobs SET progress = $2, detail = $3 WHERE id = $1

-- waiting --
UPDATE jobs SET waiting_for = $2 WHERE id = $1

-- finalizing --
UPDATE jobs SET state = 'finalizing' WHERE id = $1

-- request_cancel --
UPDATE jobs SET cancel_requested = true WHERE id = $1 RETURNING *

-- request_pause --
UPDATE jobs SET pause_requested = $2 WHERE id = $1 RETURNING *

-- end --
UPDATE jobs SET state = $2, result = $3, error_code = $4, error_message = $5, owner = NULL, lease_until = NULL,
    waiting_for = NULL, progress = CASE WHEN $2 = 'completed' THEN 100 ELSE progress END,
    cancel_requested = cancel_requested AND $2 = 'cancelled', pause_requested = false, finished_at = clock_timestamp()
WHERE id = $1 RETURNING *

-- pause --
UPDATE jobs SET state = 'paused', owner = NULL, lease_until = NULL, waiting_for = NULL, pause_requested = false
WHERE id = $1 RETURNING *

-- again --
-- Back into the queue: after $2, as attempt $3 done so far, with the failure that led there or none.
UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, waiting_for = NULL, finished_at = NULL,
    run_at = clock_timestamp() + $2, attempt = $3, error_code = $4, error_message = $5,
    cancel_requested = false, pause_requested = false
WHERE id = $1 RETURNING *

-- lapsed --
SELECT * FROM jobs WHERE state IN ('running', 'finalizing') AND lease_until <= clock_timestamp()
ORDER BY lease_until FOR UPDATE SKIP LOCKED LIMIT 20

-- announce --
INSERT INTO job_workers (incarnation, device, kinds, limits, slots) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (incarnation) DO UPDATE SET seen_at = clock_timestamp()

-- withdraw --
DELETE FROM job_workers WHERE incarnation = $1 OR seen_at < clock_timestamp() - interval '1 day'

-- counts --
SELECT kind, state, count(*) AS jobs FROM jobs GROUP BY kind, state

-- oldest_queued --
SELECT kind, coalesce(extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE state = 'queued')), 0)::float8
    AS seconds
FROM jobs GROUP BY kind

-- attempts --
SELECT kind, sum(fence)::bigint AS attempts FROM jobs GROUP BY kind
