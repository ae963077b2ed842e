-- claim --
-- A second caller with the same id waits here until the first one's transaction ends.
INSERT INTO idempotent_requests (caller, method, request_id, digest) VALUES ($1, $2, $3, $4)
ON CONFLICT DO NOTHING RETURNING request_id

-- find --
SELECT digest, answer FROM idempotent_requests WHERE caller = $1 AND method = $2 AND request_id = $3

-- answer --
UPDATE idempotent_requests SET answer = $4 WHERE caller = $1 AND method = $2 AND request_id = $3

-- purge --
DELETE FROM idempotent_requests WHERE created_at < clock_timestamp() - $1::interval
