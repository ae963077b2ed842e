-- get --
SELECT * FROM models_placed WHERE id = $1

-- lock --
SELECT id FROM models WHERE id = $1 FOR NO KEY UPDATE

-- page --
SELECT * FROM models_placed
WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR model_type = $2)
  AND ($3::timestamptz IS NULL OR (created_at, id) < ($3, $4::text))
ORDER BY created_at DESC, id DESC LIMIT $5 OFFSET $6

-- count --
SELECT count(*) FROM models WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR model_type = $2)

-- unquantized_perplexity --
SELECT (p.value ->> 'perplexity')::float8
FROM models m, jsonb_array_elements(m.perplexities) WITH ORDINALITY p (value, position)
WHERE m.digest = $1 AND p.value ->> 'quantization' = 'none' AND p.value ->> 'dataset_id' = $2
  AND (p.value ->> 'tokens')::bigint = $3
ORDER BY m.updated_at DESC, p.position DESC LIMIT 1

-- sharers --
SELECT count(*) FROM models m JOIN models o ON o.id <> m.id AND (
    o.digest = m.digest OR (o.source, o.model_identifier) = (m.source, m.model_identifier))
WHERE m.id = $1

-- append_perplexity --
UPDATE models SET perplexities = perplexities || jsonb_build_array($2::jsonb), updated_at = now() WHERE id = $1

-- to_restore --
-- Wanted on a device, and nowhere, and not because a load of it failed.
SELECT id FROM models m
WHERE wanted AND status IN ('pending', 'unloaded')
  AND NOT EXISTS (SELECT FROM residencies r JOIN hosts h USING (host_id)
                  WHERE r.model_id = m.id AND r.state <> 'lost' AND NOT h.lost)
ORDER BY pinned DESC, last_used_at DESC NULLS LAST, created_at

-- want_preloaded --
-- When no host was heard lately the whole mesh starts: what is wanted then is what is marked for preload.
UPDATE models SET wanted = preload, status = CASE WHEN preload AND status = 'failed' THEN 'unloaded' ELSE status END
WHERE NOT EXISTS (SELECT FROM hosts WHERE NOT lost AND heartbeat_at > clock_timestamp() - make_interval(secs => $1))

-- delete --
DELETE FROM models WHERE id = $1

-- users --
SELECT 'group ' || id AS name FROM groups WHERE model_id = $1
UNION ALL
SELECT 'lens ' || id FROM lenses WHERE activation_source_model_id = $1
UNION ALL
SELECT 'job ' || id FROM jobs
WHERE state IN ('queued', 'running', 'finalizing', 'paused') AND payload ->> 'model_id' = $1 AND kind <> 'model_load'
LIMIT 50

-- measured --
SELECT memory_bytes, seconds FROM loads
WHERE model_id = $1 AND quantization = $2 AND outcome = 'ready' AND memory_bytes IS NOT NULL
ORDER BY started_at DESC LIMIT 1

-- load_speed --
SELECT sum(memory_bytes) / nullif(sum(seconds), 0) FROM (
    SELECT memory_bytes, seconds FROM loads
    WHERE outcome = 'ready' AND memory_bytes IS NOT NULL AND seconds > 0 ORDER BY started_at DESC LIMIT 20
) latest

-- lock_user --
SELECT pg_advisory_xact_lock(hashtextextended('lensmesh_loads:' || $1, 0))

-- loads_within_hour --
SELECT count(*) AS loads,
       coalesce(extract(epoch FROM min(started_at) + interval '1 hour' - clock_timestamp()), 0)::float8 AS seconds
FROM loads WHERE cause = 'user' AND created_by = $1 AND started_at > clock_timestamp() - interval '1 hour'

-- abandoned_loads --
SELECT l.id FROM loads l LEFT JOIN jobs j USING (id)
WHERE l.outcome = 'running' AND (j.id IS NULL OR j.state IN ('completed', 'failed', 'cancelled'))

-- counted --
SELECT
    (SELECT coalesce(jsonb_object_agg(status, n), '{}')
     FROM (SELECT status, count(*) AS n FROM models GROUP BY status) s) AS models,
    (SELECT count(*) FROM models WHERE pinned) AS pinned,
    (SELECT coalesce(extract(epoch FROM clock_timestamp() - min(last_used_at)), 0)::float8
     FROM residencies WHERE state = 'resident') AS lru_age_seconds,
    (SELECT count(*) FROM lens_residencies WHERE state NOT IN ('parked', 'dropping')) AS lenses,
    (SELECT coalesce(sum(r.charge_bytes * greatest(l.lenses - 1, 0)), 0)::bigint
     FROM residencies r
     JOIN (SELECT model_id, host_id, count(*) AS lenses FROM lens_residencies
           WHERE state NOT IN ('parked', 'dropping') GROUP BY model_id, host_id) l
     USING (model_id, host_id) WHERE r.state = 'resident') AS saved_bytes
