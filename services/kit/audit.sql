-- record --
INSERT INTO audit_log (caller, method, resource, outcome, trace)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])

-- purge --
DELETE FROM audit_log WHERE at < clock_timestamp() - $1::interval
