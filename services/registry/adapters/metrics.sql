-- jobs --
SELECT kind, state, count(*) AS jobs FROM jobs GROUP BY kind, state

-- oldest --
SELECT kind, coalesce(extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE state = 'queued')), 0)::float8
    AS seconds
FROM jobs GROUP BY kind
