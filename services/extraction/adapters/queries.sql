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
-- The last extraction of the same hook points, else of the model; and of the dataset at this length.
SELECT
    (SELECT tokens / seconds FROM extractions
     WHERE model_id = $1 AND NOT reused AND finished_at IS NOT NULL AND seconds > 0
     ORDER BY (hook_points = $3) DESC, finished_at DESC LIMIT 1) AS tokens_per_second,
    (SELECT tokens::double precision / total_samples FROM extractions
     WHERE dataset_id = $2 AND model_id = $1 AND NOT reused AND finished_at IS NOT NULL AND total_samples > 0
       AND (options ->> 'max_length')::integer = $4
     ORDER BY finished_at DESC LIMIT 1) AS tokens_per_sample

-- claimed --
SELECT content_key, options, model_id, dataset_id, cache_id FROM extractions WHERE id = $1 FOR UPDATE

-- ahead --
SELECT o.id FROM extractions e
JOIN extractions o ON o.content_key = e.content_key AND o.hook_points @> e.hook_points
                  AND (o.created_at, o.id) < (e.created_at, e.id)
JOIN jobs j ON j.id = o.job_id AND j.state IN ('running', 'finalizing')
WHERE e.id = $1 ORDER BY o.created_at, o.id LIMIT 1

-- set_plan --
UPDATE extractions SET plan_digest = $2, total_samples = $3 WHERE id = $1

-- drop_units --
-- Units of another plan, or on another host, are worth nothing here.
DELETE FROM extraction_units u USING extractions e
WHERE u.extraction_id = $1 AND e.id = $1 AND (u.store_id <> $2 OR e.plan_digest IS DISTINCT FROM $3)

-- units --
SELECT unit, fence, size_bytes, digest FROM extraction_units WHERE extraction_id = $1 ORDER BY unit

-- add_unit --
-- Again, where it is not known whether the first time counted.
INSERT INTO extraction_units (extraction_id, unit, store_id, fence, size_bytes, digest) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (extraction_id, unit) DO UPDATE SET store_id = $3, fence = $4, size_bytes = $5, digest = $6

-- drop_unit --
DELETE FROM extraction_units WHERE extraction_id = $1 AND unit = $2

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
