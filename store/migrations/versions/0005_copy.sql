-- Copies what needs no Python from the tables of revision 0004, which 0005 sets aside as old_NAME.

INSERT INTO prompts (digest)
SELECT prompt_digest FROM old_target_traces
UNION SELECT prompt_digest FROM old_acceptance_traces
UNION SELECT prompt_digest FROM old_lookup_traces
UNION SELECT prompt_digest FROM old_samples;

INSERT INTO sweeps (target_key, environment_digest, measured_at, digest, batch_size, context_length, max_length)
SELECT target_key, environment_digest, min(measured_at), sweep, batch_size, context_length, max_length
FROM old_step_times
GROUP BY target_key, environment_digest, sweep, batch_size, context_length, max_length
ORDER BY min(id);

INSERT INTO units (target_key, environment_digest, measured_at, workload_id, digest, purpose)
SELECT target_key, environment_digest, min(measured_at), workloads.id, unit, occasion
FROM old_samples
JOIN workloads ON workloads.timing_digest = old_samples.anchor_digest
GROUP BY target_key, environment_digest, workloads.id, unit, occasion
ORDER BY min(old_samples.id);

INSERT INTO samples (
    unit_id, position, setup_id, prompt_id, ttft_s, decode_s, output_tokens, rounds, shapes, refills, output_digest,
    disturbed
)
SELECT
    units.id, position, setups.id, prompts.id, ttft_s, decode_s, output_tokens, rounds, shapes, refills, output_digest,
    disturbed
FROM old_samples
JOIN units ON units.digest = old_samples.unit
JOIN setups ON setups.digest = old_samples.setup_digest
JOIN prompts ON prompts.digest = old_samples.prompt_digest;

INSERT INTO infeasible (
    target_key, environment_digest, measured_at, workload_id, setup_id, setup, reason, detail
)
SELECT target_key, environment_digest, measured_at, workloads.id, setups.id, setup, reason, detail
FROM old_infeasible
JOIN workloads ON workloads.timing_digest = old_infeasible.anchor_digest
JOIN setups ON setups.digest = old_infeasible.setup_digest
ORDER BY old_infeasible.id;
