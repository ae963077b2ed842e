-- register --
WITH former AS (SELECT incarnation FROM hosts WHERE host_id = $1)
INSERT INTO hosts (host_id, incarnation, address, device, kind, total_bytes, budget_bytes, park_bytes, accelerator,
                   services)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
ON CONFLICT (host_id) DO UPDATE SET incarnation = $2, address = $3, device = $4, kind = $5, total_bytes = $6,
    budget_bytes = $7, park_bytes = $8, accelerator = $9, services = $10, lost = false,
    registered_at = clock_timestamp(), heartbeat_at = clock_timestamp()
RETURNING (SELECT incarnation FROM former) AS former

-- heartbeat --
UPDATE hosts SET heartbeat_at = clock_timestamp(), measured_bytes = $3, temperature_celsius = $4, utilization_ratio = $5,
    power_watts = $6, device_used_bytes = $7, process_bytes = $8
WHERE host_id = $1 AND incarnation = $2 AND NOT lost RETURNING host_id

-- lock_hosts --
SELECT host_id FROM hosts WHERE NOT lost ORDER BY host_id FOR NO KEY UPDATE

-- hosts --
SELECT * FROM hosts_counted WHERE NOT lost ORDER BY name

-- all_hosts --
SELECT * FROM hosts_counted ORDER BY name

-- host --
-- With the others of its device.
SELECT o.* FROM hosts_counted h JOIN hosts_counted o USING (machine, device, accelerator) WHERE h.host_id = $1

-- lock_host --
-- With the others of its device, which share its ledger.
SELECT o.host_id FROM hosts h JOIN hosts o USING (machine, device, accelerator) WHERE h.host_id = $1
ORDER BY o.host_id FOR NO KEY UPDATE OF o

-- silent --
SELECT host_id FROM hosts WHERE NOT lost AND heartbeat_at < clock_timestamp() - make_interval(secs => $1)
ORDER BY host_id FOR NO KEY UPDATE

-- lose --
UPDATE hosts SET lost = true WHERE host_id = $1

-- drop_reservations --
DELETE FROM reservations WHERE holder_id = $1

-- residencies --
-- $1 a host, $2 a model, $3 a job; null is any. The copy that serves is the oldest one.
SELECT r.*, m.pinned, h.address, h.device, h.incarnation, coalesce(l.held, '{}') AS lenses,
       coalesce(s.ids, '{}') AS needed_by, g.exclusive, g.reads,
       extract(epoch FROM clock_timestamp() - r.loaded_at)::float8 AS resident_seconds
FROM residencies r
JOIN hosts h USING (host_id)
JOIN models m ON m.id = r.model_id
LEFT JOIN LATERAL (
    SELECT array_agg((c.lens_id::text, c.charge_bytes, c.last_used_at, c.leases, c.state, c.job_id,
                      coalesce(i.activation_source_model_id::text, '')) ORDER BY c.lens_id) AS held
    FROM lens_residencies c LEFT JOIN lenses i ON i.id = c.lens_id
    WHERE c.model_id = r.model_id AND c.host_id = r.host_id
) l ON true
LEFT JOIN LATERAL (
    SELECT array_agg(DISTINCT p.model_id::text) AS ids FROM lens_residencies p JOIN lenses ON lenses.id = p.lens_id
    WHERE lenses.activation_source_model_id = r.model_id AND p.host_id = r.host_id AND p.model_id <> r.model_id
) s ON true
CROSS JOIN LATERAL (
    SELECT coalesce(bool_or(groups.exclusive), false) AS exclusive,
           coalesce(array_agg(DISTINCT lenses.activation_source_model_id::text)
                    FILTER (WHERE lenses.activation_source_model_id IS NOT NULL), '{}') AS reads
    FROM groups LEFT JOIN lenses ON lenses.group_id = groups.id WHERE groups.model_id = r.model_id
) g
WHERE ($1::text IS NULL OR r.host_id = $1) AND ($2::text IS NULL OR r.model_id = $2)
  AND ($3::text IS NULL OR r.job_id = $3)
ORDER BY r.state <> 'resident', r.loaded_at, r.host_id, r.model_id

-- forget_ended_preloads --
DELETE FROM residencies r USING jobs j
WHERE r.state = 'parked' AND j.id = r.job_id AND j.kind = 'group_preload'
  AND j.state IN ('completed', 'failed', 'cancelled')

-- revert_unloads --
WITH lenses AS (
    UPDATE lens_residencies SET state = CASE state WHEN 'dropping' THEN 'parked' ELSE 'here' END
    WHERE state NOT IN ('here', 'parked') AND job_id IS NULL
)
UPDATE residencies SET state = 'resident' WHERE state IN ('unloading', 'parking') AND job_id IS NULL

-- arrived --
UPDATE residencies SET loaded_at = coalesce(loaded_at, clock_timestamp()), last_used_at = clock_timestamp()
WHERE model_id = $1 AND host_id = $2
RETURNING loaded_at

-- touch --
UPDATE residencies SET last_used_at = clock_timestamp() WHERE model_id = $1 AND host_id = $2

-- use --
UPDATE residencies r SET leases = s.leases, active_lens_id = nullif(s.active, ''),
    last_used_at = greatest(r.last_used_at, clock_timestamp() - make_interval(secs => s.idle))
FROM unnest($2::text[], $3::integer[], $4::text[], $5::float8[]) AS s (model_id, leases, active, idle)
WHERE r.host_id = $1 AND r.model_id = s.model_id

-- use_lenses --
-- Leases and last use, as the host reports them.
UPDATE lens_residencies l SET leases = s.leases,
    last_used_at = greatest(l.last_used_at, clock_timestamp() - make_interval(secs => s.idle))
FROM unnest($2::text[], $3::integer[], $4::float8[]) AS s (lens_id, leases, idle)
WHERE l.host_id = $1 AND l.lens_id = s.lens_id

-- touch_lenses --
UPDATE lens_residencies SET last_used_at = clock_timestamp() WHERE host_id = $1 AND lens_id = ANY ($2::text[])

-- lens_leaves --
-- For a load, or with a null job for another lens. One that is parked already leaves host memory, too.
UPDATE lens_residencies SET job_id = $3,
    state = CASE WHEN state = 'parked' THEN 'dropping' WHEN $4 THEN 'parking' ELSE 'leaving' END
WHERE host_id = $1 AND lens_id = $2

-- lens_stays --
-- $3 is the number of leases that keep it there, null when it is not known that any does.
UPDATE lens_residencies SET state = CASE state WHEN 'dropping' THEN 'parked' ELSE 'here' END, job_id = NULL,
    leases = coalesce($3, leases)
WHERE host_id = $1 AND lens_id = $2

-- lenses_stay --
UPDATE lens_residencies SET state = CASE state WHEN 'dropping' THEN 'parked' ELSE 'here' END, job_id = NULL
WHERE job_id = $1

-- remove --
DELETE FROM residencies WHERE model_id = $1 AND host_id = $2 RETURNING model_id

-- charge --
UPDATE residencies SET charge_bytes = least(required_bytes, charge_bytes + $3)
WHERE job_id = $1 AND host_id = $2 AND state = 'loading'

-- gain --
UPDATE reservations SET bytes = least($4, bytes + $3) WHERE host_id = $1 AND owner = $2

-- release --
DELETE FROM reservations WHERE holder_id = $1 AND owner = $2

-- fingerprint --
SELECT fingerprint FROM fingerprints WHERE model_id = $1 AND host_id = $2 AND quantization = $3 AND incarnation = $4
