-- get --
SELECT * FROM groups WHERE id = $1

-- lock --
SELECT id FROM groups WHERE id = $1 FOR NO KEY UPDATE

-- page --
SELECT * FROM groups
WHERE ($1::text IS NULL OR model_id = $1) AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3::text))
ORDER BY created_at DESC, id DESC LIMIT $4 OFFSET $5

-- count --
SELECT count(*) FROM groups WHERE $1::text IS NULL OR model_id = $1

-- delete --
DELETE FROM groups WHERE id = $1

-- lock_of_model --
SELECT id FROM groups WHERE model_id = $1 ORDER BY id FOR NO KEY UPDATE

-- of_model --
SELECT * FROM groups WHERE model_id = $1 ORDER BY created_at, id

-- lenses --
-- With the bytes of the copy on the host that serves the base, or else has it parked.
SELECT l.*, r.charge_bytes, coalesce(r.parked, false) AS parked
FROM lenses l
JOIN groups g ON g.id = l.group_id
JOIN models_placed m ON m.id = g.model_id
LEFT JOIN LATERAL (
    SELECT c.charge_bytes, 'parked' IN (b.state, c.state) AS parked
    FROM lens_residencies c JOIN residencies b USING (model_id, host_id)
    WHERE c.lens_id = l.id AND (c.host_id = m.host_id OR m.host_id IS NULL AND b.state = 'parked')
    ORDER BY b.last_used_at DESC LIMIT 1
) r ON true
WHERE l.group_id = ANY ($1)
ORDER BY l.created_at, l.id

-- lens_failed --
UPDATE lenses SET error_code = $2, error_message = $3 WHERE id = $1

-- retarget_lens --
UPDATE lenses SET artifact_uri = $2 WHERE id = $1

-- remove_lens --
WITH gone AS (DELETE FROM lenses WHERE id = $1 RETURNING id),
     freed AS (DELETE FROM lens_residencies WHERE lens_id = $1)
UPDATE groups SET active_lens_id = NULL WHERE active_lens_id = $1

-- charge_lens --
UPDATE lens_residencies SET charge_bytes = least($4::bigint, charge_bytes + $3::bigint)
WHERE lens_id = $1 AND host_id = $2

-- displace_lens --
DELETE FROM lens_residencies WHERE lens_id = $1 AND host_id = $2

-- lens_parked --
UPDATE lens_residencies SET state = 'parked', job_id = NULL, leases = 0 WHERE lens_id = $1 AND host_id = $2

-- exclusive --
SELECT EXISTS (SELECT FROM groups WHERE model_id = $1 AND exclusive)

-- begin_turn --
SELECT g.id, array(SELECT l.id::text FROM lenses l WHERE l.group_id = g.id AND l.id = ANY ($2)) AS lens_ids
FROM groups g WHERE g.model_id = $1 ORDER BY g.id FOR NO KEY UPDATE

-- end_turn --
WITH done AS (
    SELECT * FROM unnest($2::text[], $3::text[], $4::text[], $5::float8[])
        WITH ORDINALITY AS t (group_id, lens_id, kind, seconds, place)
), recorded AS (
    INSERT INTO switches (group_id, kind, seconds) SELECT group_id, kind, seconds FROM done ORDER BY place
), latest AS (
    SELECT DISTINCT ON (group_id) group_id, lens_id, place = max(place) OVER () AS last_of_all
    FROM done ORDER BY group_id, place DESC
)
UPDATE groups g SET active_lens_id = CASE WHEN l.kind <> 'extension' OR t.last_of_all THEN l.id END
FROM groups b LEFT JOIN latest t ON t.group_id = b.id
LEFT JOIN lenses l ON l.id = CASE WHEN t.group_id IS NULL THEN b.active_lens_id ELSE t.lens_id END
WHERE g.id = b.id AND b.model_id = $1

-- activate_extension --
-- The lens of that extension where a group has one; else no altering lens, and a reading one stays.
UPDATE groups g SET active_lens_id = coalesce(
    (SELECT l.id FROM lenses l WHERE l.group_id = g.id AND l.extension_id = $2 ORDER BY l.created_at LIMIT 1),
    (SELECT l.id FROM lenses l WHERE l.id = g.active_lens_id AND l.kind <> 'extension'))
WHERE g.model_id = $1

-- record_switch --
INSERT INTO switches (group_id, kind, seconds) VALUES ($1, $2, $3)

-- switch_seconds --
SELECT coalesce(
    (SELECT avg(seconds) FROM (
        SELECT seconds FROM switches WHERE group_id = $1 AND kind = $2 ORDER BY id DESC LIMIT 20) own),
    (SELECT avg(seconds) FROM (SELECT seconds FROM switches WHERE kind = $2 ORDER BY id DESC LIMIT 20) anybody))
