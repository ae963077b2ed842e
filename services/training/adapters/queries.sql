-- insert_training --
INSERT INTO trainings (job_id, model_id, layers, dataset_id, cache_id, plan, retention, created_by)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)

-- training --
SELECT t.job_id, t.job_id AS id, t.model_id, t.layers, t.dataset_id, t.cache_id, t.plan, t.retention, t.finalize_id,
       t.created_by, t.created_at, j.state, j.progress, j.detail, j.error_code, j.error_message, j.waiting_for, j.finished_at
FROM trainings t JOIN jobs_explained j ON j.id = t.job_id
WHERE t.job_id = $1

-- trainings --
SELECT t.job_id, t.job_id AS id, t.model_id, t.layers, t.dataset_id, t.cache_id, t.plan, t.retention, t.finalize_id,
       t.created_by, t.created_at, j.state, j.progress, j.detail, j.error_code, j.error_message, j.waiting_for, j.finished_at
FROM trainings t JOIN jobs_explained j ON j.id = t.job_id
WHERE ($1 = '' OR t.model_id = $1) AND ($2 = '' OR j.state = $2)
  AND ($3::timestamptz IS NULL OR (t.created_at, t.job_id) < ($3, $4::text))
ORDER BY t.created_at DESC, t.job_id DESC LIMIT $5 OFFSET $6

-- count_trainings --
SELECT count(*) FROM trainings t JOIN jobs j ON j.id = t.job_id
WHERE ($1 = '' OR t.model_id = $1) AND ($2 = '' OR j.state = $2)

-- checkpoints --
SELECT id, job_id, step, tokens_seen, fvu, artifact_uri, size_bytes, created_at FROM training_checkpoints
WHERE job_id = ANY ($1::text[]) ORDER BY job_id, step

-- made_by --
SELECT id, job_id FROM transcoders WHERE job_id = ANY ($1::text[]) ORDER BY job_id, layer, coder

-- history --
-- Every n-th point counted from the last one.
SELECT figures FROM (
    SELECT step, figures, row_number() OVER (ORDER BY step DESC) - 1 AS place, count(*) OVER () AS points
    FROM training_points WHERE job_id = $1) p
WHERE place % greatest(1, ceil(points::float8 / $2)::bigint) = 0
ORDER BY step

-- settle --
UPDATE trainings SET plan = $2, cache_id = $3 WHERE job_id = $1

-- forget_points --
DELETE FROM training_points WHERE job_id = $1 AND step > $2

-- add_point --
INSERT INTO training_points (job_id, step, figures) VALUES ($1, $2, $3)
ON CONFLICT (job_id, step) DO UPDATE SET figures = $3

-- set_finalize --
UPDATE trainings SET finalize_id = $2 WHERE job_id = $1

-- lock_training --
SELECT finalize_id, retention FROM trainings WHERE job_id = $1 FOR UPDATE

-- add_checkpoint --
INSERT INTO training_checkpoints (id, job_id, fence, step, tokens_seen, fvu, artifact_uri, size_bytes)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (job_id, step) DO UPDATE SET fence = $3, fvu = $6, artifact_uri = $7, size_bytes = $8

-- drop_checkpoints --
-- All but those of $2.
DELETE FROM training_checkpoints WHERE job_id = $1 AND id <> ALL ($2::text[]) RETURNING artifact_uri

-- unused --
SELECT uri FROM unnest($1::text[]) AS uri
WHERE NOT EXISTS (SELECT FROM training_checkpoints c WHERE c.artifact_uri = uri)
  AND NOT EXISTS (SELECT FROM transcoders t WHERE t.artifact_uri = uri)

-- insert_transcoder --
INSERT INTO transcoders (id, job_id, coder, name, model_id, layer, source_hook_point, target_hook_point, d_in, d_out,
                         dict_size, group_sizes, top_k, activation, base_digest, tokens_seen, train_fvu, artifact_uri,
                         size_bytes, created_by)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)

-- transcoder --
SELECT * FROM transcoders WHERE id = $1

-- transcoders --
SELECT * FROM transcoders
WHERE ($1 = '' OR model_id = $1) AND ($2::integer IS NULL OR layer = $2)
  AND ($3::timestamptz IS NULL OR (created_at, id) < ($3, $4::text))
ORDER BY created_at DESC, id DESC LIMIT $5 OFFSET $6

-- count_transcoders --
SELECT count(*) FROM transcoders WHERE ($1 = '' OR model_id = $1) AND ($2::integer IS NULL OR layer = $2)

-- delete_transcoder --
DELETE FROM transcoders WHERE id = $1

-- derived --
-- What was made of a transcoder: exports, feature samples; its own files are not among them.
SELECT uri FROM artifacts WHERE meta ->> 'transcoder_id' = $1 AND uri <> $2

-- newest_samples --
SELECT uri FROM artifacts WHERE kind = $2 AND meta ->> 'transcoder_id' = $1 AND state = 'ready'
ORDER BY used_at DESC LIMIT 1

-- insert_evaluation --
INSERT INTO evaluations (id, job_id, transcoder_id, training_id, checkpoint_id, dataset_id, options, created_by)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)

-- judged --
-- Checkpoints of a training that evaluations still have to read.
SELECT e.checkpoint_id FROM evaluations e JOIN jobs j ON j.id = e.job_id
WHERE e.training_id = $1 AND j.state NOT IN ('completed', 'failed', 'cancelled')

-- evaluation_of_job --
SELECT options FROM evaluations WHERE job_id = $1

-- finish_evaluation --
UPDATE evaluations SET figures = $2, finished_at = clock_timestamp() WHERE job_id = $1

-- evaluations --
SELECT id, coalesce(transcoder_id, '') AS transcoder_id, coalesce(training_id, '') AS training_id,
       coalesce(checkpoint_id, '') AS checkpoint_id, coalesce(options ->> 'coder', '') AS coder, dataset_id, job_id,
       figures, finished_at AS created_at
FROM evaluations
WHERE transcoder_id = $1 AND finished_at IS NOT NULL
  AND ($2::timestamptz IS NULL OR (finished_at, id) < ($2, $3::text))
ORDER BY finished_at DESC, id DESC LIMIT $4 OFFSET $5

-- evaluations_by_id --
SELECT id, coalesce(transcoder_id, '') AS transcoder_id, coalesce(training_id, '') AS training_id,
       coalesce(checkpoint_id, '') AS checkpoint_id, coalesce(options ->> 'coder', '') AS coder, dataset_id, job_id,
       figures, finished_at AS created_at
FROM evaluations
WHERE id = ANY ($1::text[]) AND finished_at IS NOT NULL ORDER BY array_position($1::text[], id::text)

-- count_evaluations --
SELECT count(*) FROM evaluations WHERE transcoder_id = $1 AND finished_at IS NOT NULL
