-- insert --
INSERT INTO extensions (id, model_id, task_name, kind, lora, layers, parameter_counts, base_digest, created_by,
                        freeze_base, shared_layer_of, train_shared_layer)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)

-- insert_version --
INSERT INTO extension_versions (extension_id, version, artifact_uri, digest, size_bytes) VALUES ($1, $2, $3, $4, $5)

-- get --
SELECT e.*, v.artifact_uri, v.digest, v.size_bytes, j.error_code, j.error_message,
       CASE WHEN j.state IN ('queued', 'running', 'paused', 'finalizing') THEN 'training'
            WHEN j.state = 'failed' THEN 'failed'
            WHEN e.trained_steps > 0 THEN 'trained'
            ELSE 'created' END AS status
FROM extensions e
JOIN extension_versions v ON v.extension_id = e.id AND v.version = e.version
LEFT JOIN jobs j ON j.id = e.job_id
WHERE e.id = $1

-- list --
SELECT e.*, v.artifact_uri, v.digest, v.size_bytes, j.error_code, j.error_message,
       CASE WHEN j.state IN ('queued', 'running', 'paused', 'finalizing') THEN 'training'
            WHEN j.state = 'failed' THEN 'failed'
            WHEN e.trained_steps > 0 THEN 'trained'
            ELSE 'created' END AS status
FROM extensions e
JOIN extension_versions v ON v.extension_id = e.id AND v.version = e.version
LEFT JOIN jobs j ON j.id = e.job_id
WHERE ($1 = '' OR e.model_id = $1) AND ($2 = '' OR e.task_name = $2)
  AND ($3::timestamptz IS NULL OR (e.created_at, e.id) < ($3, $4::text))
ORDER BY e.created_at DESC, e.id DESC
LIMIT $5 OFFSET $6

-- count --
SELECT count(*) FROM extensions WHERE ($1 = '' OR model_id = $1) AND ($2 = '' OR task_name = $2)

-- lock --
SELECT version FROM extensions WHERE id = $1 FOR UPDATE

-- training_state --
SELECT j.id, j.state FROM extensions e JOIN jobs j ON j.id = e.job_id WHERE e.id = $1

-- set_job --
UPDATE extensions SET job_id = $2 WHERE id = $1

-- insert_training --
INSERT INTO extension_trainings (job_id, extension_id, artifact_uri)
SELECT $2, e.id, v.artifact_uri FROM extensions e
JOIN extension_versions v ON v.extension_id = e.id AND v.version = e.version WHERE e.id = $1

-- training --
SELECT artifact_uri, checkpoint_uri, loss_before, result FROM extension_trainings WHERE job_id = $1

-- begun --
UPDATE extension_trainings SET loss_before = $2 WHERE job_id = $1

-- set_checkpoint --
UPDATE extension_trainings t SET checkpoint_uri = $2 FROM extension_trainings former
WHERE t.job_id = $1 AND former.job_id = t.job_id
RETURNING former.checkpoint_uri

-- set_result --
UPDATE extension_trainings SET result = $2 WHERE job_id = $1

-- finish --
UPDATE extensions SET version = version + 1, trained_steps = trained_steps + $2, loss_before = $3, loss_after = $4
WHERE id = $1
RETURNING version

-- finish_whole --
UPDATE extensions SET trained_steps = trained_steps + $2, loss_before = $3, loss_after = $4 WHERE id = $1

-- sharers --
SELECT e.id, (SELECT j.payload FROM extension_trainings t JOIN jobs j ON j.id = t.job_id
              WHERE t.extension_id = e.id AND t.result IS NOT NULL ORDER BY j.finished_at DESC LIMIT 1) AS payload
FROM extensions e
WHERE e.id <> $1 AND coalesce(nullif(e.shared_layer_of, ''), e.id)
    = (SELECT coalesce(nullif(o.shared_layer_of, ''), o.id) FROM extensions o WHERE o.id = $1)
ORDER BY e.id

-- training_of_family --
SELECT j.id FROM extensions e JOIN jobs j ON j.id = e.job_id
WHERE e.id <> $1 AND j.state IN ('queued', 'running', 'paused', 'finalizing')
    AND coalesce(nullif(e.shared_layer_of, ''), e.id)
      = (SELECT coalesce(nullif(o.shared_layer_of, ''), o.id) FROM extensions o WHERE o.id = $1)
LIMIT 1

-- over_layers --
UPDATE extensions SET version = version + 1, loss_after = coalesce($2, loss_after) WHERE id = $1
RETURNING version

-- artifacts_of --
SELECT artifact_uri FROM extension_versions WHERE extension_id = $1
UNION
SELECT checkpoint_uri FROM extension_trainings WHERE extension_id = $1 AND checkpoint_uri IS NOT NULL

-- delete --
DELETE FROM extensions WHERE id = $1

-- unused --
SELECT uri FROM unnest($1::text[]) AS uri
WHERE NOT EXISTS (SELECT 1 FROM extension_versions v WHERE v.artifact_uri = uri)
  AND NOT EXISTS (SELECT 1 FROM extension_trainings t WHERE t.checkpoint_uri = uri)
