-- keep --
INSERT INTO habits (subject, from_group_id, from_lens_id, to_group_id, to_lens_id, times)
SELECT s.* FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[])
    AS s (subject, from_group_id, from_lens_id, to_group_id, to_lens_id, times)
WHERE EXISTS (SELECT FROM groups WHERE id = s.from_group_id) AND EXISTS (SELECT FROM groups WHERE id = s.to_group_id)
ORDER BY 1, 2, 3, 4, 5
ON CONFLICT (subject, from_group_id, from_lens_id, to_group_id, to_lens_id)
DO UPDATE SET times = habits.times + excluded.times, at = clock_timestamp()

-- likely --
-- The next step that is at least as likely as all others together, after it was seen twice; a user's own steps count
-- four times as much as everyone's.
SELECT to_group_id, to_lens_id FROM (
    SELECT to_group_id, to_lens_id, sum(times) AS times,
           sum(times * CASE WHEN subject = $1 THEN 4 ELSE 1 END) AS weight,
           sum(sum(times * CASE WHEN subject = $1 THEN 4 ELSE 1 END)) OVER () AS all_weights
    FROM habits WHERE from_group_id = $2 AND from_lens_id = $3 GROUP BY to_group_id, to_lens_id
) step
WHERE times >= 2 AND weight * 2 >= all_weights
ORDER BY weight DESC, to_group_id, to_lens_id LIMIT 1

-- preloading --
SELECT EXISTS (SELECT FROM jobs WHERE kind = 'group_preload' AND payload ->> 'group_id' = $1
               AND state IN ('queued', 'running', 'finalizing'))
