-- emit --
-- The lock on the topic's row, kept until commit, keeps the sequence without gaps and in commit order; the time is read
-- after it, so that it grows with the sequence.
WITH stream AS (
    INSERT INTO event_streams (topic, prefix, last_sequence) VALUES ($1, $2, 1)
    ON CONFLICT (topic) DO UPDATE SET last_sequence = event_streams.last_sequence + 1
    RETURNING last_sequence
)
INSERT INTO events (topic, sequence, event, resource_id, data, created_at)
SELECT $1, t.sequence, $3, $4, $5::jsonb || jsonb_build_object(
    'sequence', t.sequence,
    'timestamp', to_char(t.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')), t.at
FROM stream CROSS JOIN LATERAL (SELECT last_sequence AS sequence, clock_timestamp() AS at) t
RETURNING sequence, pg_notify('lensmesh_events', topic || ' ' || sequence)

-- heads --
SELECT topic, last_sequence FROM event_streams WHERE topic = ANY ($1) OR prefix = ANY ($2)

-- after --
-- Events of the given topics and prefixes beyond a sequence per topic; a topic that $3 does not name starts at 0.
SELECT e.id, e.topic, e.sequence, e.event, e.resource_id, e.data, e.created_at
FROM event_streams s
JOIN LATERAL (
    SELECT * FROM events
    WHERE events.topic = s.topic AND events.sequence > coalesce(($3::jsonb ->> s.topic)::bigint, 0)
    ORDER BY events.sequence LIMIT $4
) e ON true
WHERE (s.topic = ANY ($1) OR s.prefix = ANY ($2)) AND s.last_sequence > coalesce(($3::jsonb ->> s.topic)::bigint, 0)
ORDER BY e.topic, e.sequence
LIMIT $4

-- outbox --
SELECT id, topic, sequence, event, resource_id, data, created_at FROM events WHERE relayed_at IS NULL ORDER BY id LIMIT $1

-- mark_relayed --
UPDATE events SET relayed_at = clock_timestamp() WHERE id = ANY ($1)

-- outbox_depth --
SELECT count(*) AS depth, coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS lag_seconds
FROM events WHERE relayed_at IS NULL

-- purge --
-- The last event of a topic stays, so that how something ended can still be told after its events have aged.
DELETE FROM events e USING event_streams s
WHERE e.created_at < clock_timestamp() - $1::interval AND e.relayed_at IS NOT NULL
  AND s.topic = e.topic AND e.sequence < s.last_sequence
