-- get --
SELECT * FROM datasets WHERE id = $1

-- page --
SELECT * FROM datasets WHERE $1::timestamptz IS NULL OR (created_at, id) < ($1, $2::text)
ORDER BY created_at DESC, id DESC LIMIT $3 OFFSET $4

-- count --
SELECT count(*) FROM datasets

-- delete --
DELETE FROM datasets WHERE id = $1

-- users --
SELECT id FROM jobs
WHERE state IN ('queued', 'running', 'finalizing', 'paused') AND jsonb_path_exists(payload, '$.** ? (@ == $id)', jsonb_build_object('id', $1::text))
LIMIT 50

-- add_texts --
INSERT INTO dataset_texts (dataset_id, ordinal, text)
SELECT $1, t.ordinal - 1, t.text FROM unnest($2::text[]) WITH ORDINALITY AS t (text, ordinal)

-- texts --
SELECT text FROM dataset_texts WHERE dataset_id = $1 AND ordinal >= $2 ORDER BY ordinal LIMIT $3
