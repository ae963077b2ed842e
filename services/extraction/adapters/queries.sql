-- get --
SELECT * FROM extractions_explained WHERE id = $1

-- list --
SELECT * FROM extractions_explained
WHERE ($1 = '' OR model_id = $1) AND ($2 = '' OR status = $2)
  AND ($3::timestamptz IS NULL OR (created_at, id) < ($3, $4))
ORDER BY created_at DESC, id DESC LIMIT $5 OFFSET $6

-- count --
SELECT count(*) FROM extractions_explained WHERE ($1 = '' OR model_id = $1) AND ($2 = '' OR status = $2)

-- insert --
INSERT INTO extractions (id, job_id, model_id, dataset_id, options, content_key, hook_points, estimated_seconds,
                         total_samples, created_by)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)

-- job_of --
SELECT job_id FROM extractions WHERE id = $1

-- delete --
DELETE FROM extractions WHERE id = $1

-- rates --
-- The last extraction of the same hook points, else of the model; the least overhead of the last three; and of the dataset
-- at this length. An attempt that found every unit done has no rate of its own.
WITH recent AS (
    SELECT hook_points, tokens, seconds, tokens_per_second, finished_at FROM extractions
    WHERE model_id = $1 AND NOT reused AND finished_at IS NOT NULL AND tokens_per_second > 0
    ORDER BY (hook_points = $3) DESC, finished_at DESC LIMIT 3
)
SELECT
    (SELECT tokens_per_second FROM recent ORDER BY (hook_points = $3) DESC, finished_at DESC LIMIT 1),
    coalesce((SELECT greatest(min(seconds - tokens / tokens_per_second), 0) FROM recent), 0) AS overhead_seconds,
    (SELECT tokens::double precision / total_samples FROM extractions
     WHERE dataset_id = $2 AND model_id = $1 AND NOT reused AND finished_at IS NOT NULL AND total_samples > 0
       AND (options ->> 'max_length')::integer = $4
     ORDER BY finished_at DESC LIMIT 1) AS tokens_per_sample

-- claimed --
SELECT options, model_id, dataset_id, cache_id, plan_digest FROM extractions WHERE id = $1 FOR UPDATE

-- ahead --
SELECT o.id FROM extractions e
JOIN extractions o ON o.content_key = e.content_key AND o.hook_points @> e.hook_points
                  AND (o.created_at, o.id) < (e.created_at, e.id)
JOIN jobs j ON j.id = o.job_id AND j.state IN ('running', 'finalizing')
WHERE e.id = $1 ORDER BY o.created_at, o.id LIMIT 1

-- set_plan --
UPDATE extractions SET plan_digest = $2, total_samples = $3, units_total = $4, store_id = $5 WHERE id = $1

-- drop_units --
-- Units of another plan, or on another host, are worth nothing here. Rows stay, for their fences.
UPDATE extraction_units u SET size_bytes = NULL, digest = NULL, lease_until = '-infinity' FROM extractions e
WHERE u.extraction_id = $1 AND e.id = $1 AND (u.store_id <> $2 OR e.plan_digest IS DISTINCT FROM $3)

-- drop_unit --
UPDATE extraction_units SET size_bytes = NULL, digest = NULL, lease_until = '-infinity'
WHERE extraction_id = $1 AND unit = $2

-- take_unit --
-- What cannot be had from another host is made by the job's own worker.
UPDATE extraction_units SET size_bytes = NULL, digest = NULL, address = '', holder = $3, fence = fence + 1,
    lease_until = 'infinity'
WHERE extraction_id = $1 AND unit = $2 RETURNING fence

-- release_units --
UPDATE extraction_units SET lease_until = '-infinity' WHERE extraction_id = $1 AND holder = $2 AND digest IS NULL

-- units --
SELECT unit, fence, size_bytes, digest, address FROM extraction_units
WHERE extraction_id = $1 AND digest IS NOT NULL ORDER BY unit

-- lock_units --
SELECT pg_advisory_xact_lock(hashtextextended('extraction_units:' || $1, 0))

-- lease_unit --
-- The first unit that nobody has done or holds, while the extraction's job runs; for ever where $5 is null.
INSERT INTO extraction_units (extraction_id, unit, store_id, address, fence, holder, lease_until)
SELECT e.id, wanted.unit, e.store_id, $2, 1, $3, coalesce(clock_timestamp() + $5::interval, 'infinity')
FROM extractions e JOIN jobs j ON j.id = e.job_id
CROSS JOIN generate_series(0, e.units_total - 1) AS wanted(unit)
LEFT JOIN extraction_units u ON u.extraction_id = e.id AND u.unit = wanted.unit
WHERE e.id = $1 AND e.plan_digest = $4 AND j.state = 'running' AND NOT j.cancel_requested AND NOT j.pause_requested
  AND (u.unit IS NULL OR (u.digest IS NULL AND u.lease_until <= clock_timestamp()))
ORDER BY wanted.unit LIMIT 1
ON CONFLICT (extraction_id, unit) DO UPDATE
SET store_id = excluded.store_id, address = excluded.address, fence = extraction_units.fence + 1,
    holder = excluded.holder, lease_until = excluded.lease_until
RETURNING unit, fence

-- fetched_unit --
UPDATE extraction_units SET address = '' WHERE extraction_id = $1 AND unit = $2 AND fence = $3

-- keep_units --
-- Longer leases of who helps; whether there is still something to help.
WITH helped AS (
    SELECT e.id FROM extractions e JOIN jobs j ON j.id = e.job_id
    WHERE e.id = $1 AND e.plan_digest = $3 AND j.state = 'running' AND NOT j.cancel_requested AND NOT j.pause_requested
), kept AS (
    UPDATE extraction_units u SET lease_until = clock_timestamp() + $4 FROM helped
    WHERE u.extraction_id = helped.id AND u.holder = $2 AND u.digest IS NULL AND u.lease_until > clock_timestamp()
)
SELECT count(*) > 0 FROM helped

-- lock_job --
-- The job of an extraction while it runs; it stays as it is until the transaction ends.
SELECT j.id FROM jobs j JOIN extractions e ON e.job_id = j.id WHERE e.id = $1 AND j.state = 'running' FOR SHARE OF j

-- add_unit --
-- Under the unit's own fence; again, where it is not known whether the first time counted.
UPDATE extraction_units SET size_bytes = $4, digest = $5, lease_until = '-infinity'
WHERE extraction_id = $1 AND unit = $2 AND fence = $3 AND (digest IS NULL OR digest = $5)
RETURNING unit

-- to_help --
-- An extraction that another process with this kind of device works on, with units that nobody has.
SELECT e.id FROM extractions e JOIN jobs j ON j.id = e.job_id JOIN job_workers w ON w.incarnation = j.owner
WHERE j.state = 'running' AND NOT j.cancel_requested AND NOT j.pause_requested AND j.owner <> $1
  AND split_part(w.device, ':', 1) = split_part($2, ':', 1) AND NOT e.id = ANY ($3)
  AND j.started_at < clock_timestamp() - $4::interval
  AND e.units_total - 1 > (
      SELECT count(*) FROM extraction_units u
      WHERE u.extraction_id = e.id AND (u.digest IS NOT NULL OR u.lease_until > clock_timestamp()))
ORDER BY j.started_at, e.id LIMIT 1

-- helped --
SELECT e.options, e.model_id, e.dataset_id, e.plan_digest, j.fence FROM extractions e JOIN jobs j ON j.id = e.job_id
WHERE e.id = $1

-- drop_all_units --
DELETE FROM extraction_units WHERE extraction_id = $1

-- finish --
UPDATE extractions SET cache_id = $2, reused = $3, tokens = $4, total_samples = $5, seconds = $6,
                       tokens_per_second = $7, identity_error = $8, finished_at = clock_timestamp()
WHERE id = $1

-- elapsed --
SELECT extract(epoch FROM clock_timestamp() - started_at)::double precision FROM jobs WHERE id = $1

-- ended_of --
-- Of these extractions those that nobody works on any more, or that are not there at all.
SELECT id FROM unnest($1::text[]) AS wanted(id)
WHERE NOT EXISTS (
    SELECT FROM extractions e JOIN jobs j ON j.id = e.job_id
    WHERE e.id = wanted.id AND e.finished_at IS NULL AND j.state NOT IN ('completed', 'failed', 'cancelled'))
