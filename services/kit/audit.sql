-- record --
INSERT INTO audit_log (caller, method, resource, outcome, trace) VALUES ($1, $2, $3, $4, $5)

-- purge --
DELETE FROM audit_log WHERE at < clock_timestamp() - $1::interval
