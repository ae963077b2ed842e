-- emit --
-- The locks on the topics' rows, kept until commit and taken in one order, keep the sequences without gaps and in commit
-- order; the time is read after them, so that it grows with the sequence.
WITH told AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[])
        WITH ORDINALITY AS t (topic, prefix, event, resource_id, data, place)
), streams AS (
    INSERT INTO event_streams (topic, prefix, last_sequence)
    SELECT topic, min(prefix), count(*) FROM told GROUP BY topic ORDER BY topic
    ON CONFLICT (topic) DO UPDATE SET last_sequence = event_streams.last_sequence + excluded.last_sequence
    RETURNING topic, last_sequence
), numbered AS (
    SELECT t.*, s.last_sequence, s.last_sequence + 1 - row_number() OVER (PARTITION BY topic ORDER BY place DESC) AS sequence
    FROM told t JOIN streams s USING (topic)
), written AS (
    INSERT INTO events (topic, sequence, event, resource_id, data, created_at)
    SELECT topic, sequence, event, resource_id, data || jsonb_build_object(
        'sequence', sequence,
        'timestamp', to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')), at
    FROM (SELECT *, clock_timestamp() AS at FROM numbered ORDER BY place) n
    RETURNING id
)
SELECT sequence, CASE WHEN sequence = last_sequence THEN pg_notify('lensmesh_events', topic || ' ' || sequence) END
FROM numbered ORDER BY place

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
WHERE e.created_at < clock_timestamp() - $1::interval
  AND s.topic = e.topic AND e.sequence < s.last_sequence
