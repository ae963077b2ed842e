-- find --
SELECT * FROM activation_cache
WHERE content_key = $1 AND hook_points @> $2 AND created_at > clock_timestamp() - $3::interval
ORDER BY cardinality(hook_points), created_at DESC LIMIT 1

-- get --
SELECT * FROM activation_cache WHERE id = $1

-- list --
SELECT * FROM activation_cache
WHERE ($1 = '' OR model_id = $1) AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3))
ORDER BY created_at DESC, id DESC LIMIT $4 OFFSET $5

-- count --
SELECT count(*) FROM activation_cache WHERE ($1 = '' OR model_id = $1)

-- insert --
-- The same content once more is the same cache, made anew.
INSERT INTO activation_cache (id, model_id, dataset_id, layer_indices, sample_count, storage_uri, file_size_bytes,
                              extraction_time_seconds, activation_shape, content_key, hook_points, manifest)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
ON CONFLICT (storage_uri) DO UPDATE SET created_at = clock_timestamp(), last_accessed_at = clock_timestamp()
RETURNING id

-- touch --
UPDATE activation_cache SET last_accessed_at = clock_timestamp() WHERE id = $1

-- delete --
DELETE FROM activation_cache WHERE id = $1

-- here --
-- Caches of this host, least recently used first.
SELECT c.id, c.storage_uri, a.size_bytes, greatest(c.last_accessed_at, a.used_at) AS used_at
FROM activation_cache c JOIN artifacts a ON a.uri = c.storage_uri AND a.store_id = $1 AND a.state = 'ready'
ORDER BY used_at, c.id

-- unused --
SELECT c.id FROM activation_cache c JOIN artifacts a ON a.uri = c.storage_uri AND a.store_id = $1
WHERE greatest(c.last_accessed_at, a.used_at) < clock_timestamp() - $2::interval

-- orphans --
DELETE FROM activation_cache c WHERE NOT EXISTS (SELECT FROM artifacts a WHERE a.uri = c.storage_uri) RETURNING id
