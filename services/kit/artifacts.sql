-- lock --
-- Publishing, deleting and reconciling one artifact take turns; held until the transaction ends.
SELECT pg_advisory_xact_lock(hashtextextended('lensmesh_artifact:' || $1 || $2, 0))

-- insert --
INSERT INTO artifacts (uri, store_id, kind, digest, size_bytes, meta) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (uri, store_id) DO UPDATE SET state = 'ready', used_at = clock_timestamp()

-- find --
SELECT state, size_bytes, meta FROM artifacts WHERE uri = $1 AND store_id = $2

-- lease --
-- Locks the row against a deletion that has not begun; one that has begun is not leased any more.
INSERT INTO artifact_leases (id, uri, store_id, expires_at)
SELECT $1, uri, store_id, clock_timestamp() + $4 FROM (
    SELECT uri, store_id FROM artifacts WHERE uri = $2 AND store_id = $3 AND state = 'ready' FOR UPDATE) a
RETURNING id

-- touch --
UPDATE artifacts SET used_at = clock_timestamp() WHERE uri = $1 AND store_id = $2

-- renew --
UPDATE artifact_leases SET expires_at = clock_timestamp() + $2 WHERE id = $1

-- release --
DELETE FROM artifact_leases WHERE id = $1

-- lock_row --
SELECT state FROM artifacts WHERE uri = $1 AND store_id = $2 FOR UPDATE

-- readers --
SELECT count(*) FROM artifact_leases WHERE uri = $1 AND store_id = $2 AND expires_at > clock_timestamp()

-- set_state --
UPDATE artifacts SET state = $3 WHERE uri = $1 AND store_id = $2

-- delete --
DELETE FROM artifacts WHERE uri = $1 AND store_id = $2 AND state = 'deleting'

-- all --
SELECT uri, state FROM artifacts WHERE store_id = $1

-- bytes_by_kind --
SELECT kind, sum(size_bytes)::bigint AS bytes FROM artifacts WHERE store_id = $1 AND state = 'ready' GROUP BY kind

-- purge_leases --
DELETE FROM artifact_leases WHERE store_id = $1 AND expires_at < clock_timestamp()
