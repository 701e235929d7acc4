-- The tables that revision 0005 makes, and the views for people. {id}, {bytes}, {wide} and {without_rowid} differ
-- between SQLite and PostgreSQL.

CREATE TABLE prompts (
    id {id},
    digest VARCHAR NOT NULL,
    domain VARCHAR,
    num_tokens INTEGER,
    CONSTRAINT uq_prompts UNIQUE (digest)
);

CREATE TABLE workloads (
    id {id},
    digest VARCHAR NOT NULL,
    timing_digest VARCHAR NOT NULL,
    sampling_digest VARCHAR,
    batch_size INTEGER,
    context_length INTEGER,
    max_new_tokens INTEGER,
    temperature FLOAT,
    top_p FLOAT,
    top_k INTEGER,
    seed {wide},
    CONSTRAINT uq_workloads UNIQUE (digest)
);

CREATE TABLE setups (
    id {id},
    digest VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    draft VARCHAR,
    draft_kind VARCHAR,
    k INTEGER NOT NULL,
    CONSTRAINT uq_setups UNIQUE (digest)
);

CREATE TABLE runs (
    id {counted_id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_runs_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL CONSTRAINT fk_runs_environment_digest REFERENCES environments (digest),
    started_at VARCHAR NOT NULL,
    finished_at VARCHAR,
    measured_seconds FLOAT,
    grid_seconds_estimate FLOAT,
    starting_seconds FLOAT,
    measured_units INTEGER,
    reused_units INTEGER,
    engine_starts INTEGER,
    workload JSON NOT NULL,
    outcome JSON
);
CREATE INDEX ix_runs_target ON runs (target_key, environment_digest);

CREATE TABLE target_traces (
    id {id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_target_traces_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL
        CONSTRAINT fk_target_traces_environment_digest REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    sampling_digest VARCHAR NOT NULL,
    prompt_digest VARCHAR NOT NULL,
    temperature FLOAT,
    token_ids {bytes} NOT NULL,
    target_probs {bytes} NOT NULL,
    logit_gaps {bytes} NOT NULL,
    ended BOOLEAN NOT NULL,
    CONSTRAINT uq_target_traces UNIQUE (target_key, sampling_digest, prompt_digest)
);
CREATE INDEX ix_target_traces_environment ON target_traces (environment_digest, target_key, measured_at);

CREATE TABLE acceptance_traces (
    id {id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_acceptance_traces_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL
        CONSTRAINT fk_acceptance_traces_environment_digest REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    sampling_digest VARCHAR NOT NULL,
    prompt_digest VARCHAR NOT NULL,
    draft_digest VARCHAR NOT NULL,
    draft_name VARCHAR NOT NULL,
    temperature FLOAT,
    accept_probs {bytes} NOT NULL,
    confidences {bytes} NOT NULL,
    num_proposed INTEGER NOT NULL,
    num_accepted FLOAT NOT NULL,
    CONSTRAINT uq_acceptance_traces UNIQUE (target_key, sampling_digest, prompt_digest, draft_digest)
);
CREATE INDEX ix_acceptance_traces_environment ON acceptance_traces (environment_digest, target_key, measured_at);

CREATE TABLE lookup_traces (
    id {id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_lookup_traces_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL
        CONSTRAINT fk_lookup_traces_environment_digest REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    sampling_digest VARCHAR NOT NULL,
    prompt_digest VARCHAR NOT NULL,
    draft_digest VARCHAR NOT NULL,
    draft_name VARCHAR NOT NULL,
    temperature FLOAT,
    max_length INTEGER NOT NULL,
    proposed {bytes} NOT NULL,
    accepted {bytes} NOT NULL,
    num_proposed INTEGER NOT NULL,
    num_accepted FLOAT NOT NULL,
    CONSTRAINT uq_lookup_traces UNIQUE (target_key, sampling_digest, prompt_digest, draft_digest, max_length)
);
CREATE INDEX ix_lookup_traces_environment ON lookup_traces (environment_digest, target_key, measured_at);

CREATE TABLE sweeps (
    id {id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_sweeps_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL CONSTRAINT fk_sweeps_environment_digest REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    run_id INTEGER,
    digest VARCHAR NOT NULL,
    batch_size INTEGER NOT NULL,
    context_length INTEGER NOT NULL,
    max_length INTEGER NOT NULL,
    CONSTRAINT uq_sweeps UNIQUE (digest),
    CONSTRAINT fk_sweeps_run_id FOREIGN KEY (run_id) REFERENCES runs (id) ON DELETE SET NULL
);
CREATE INDEX ix_sweeps_target ON sweeps (target_key, environment_digest, batch_size, context_length);

CREATE TABLE step_times (
    sweep_id INTEGER NOT NULL,
    component_digest VARCHAR NOT NULL,
    width INTEGER NOT NULL,
    component VARCHAR NOT NULL,
    samples_s {bytes} NOT NULL,
    median_s FLOAT NOT NULL,
    disturbed BOOLEAN NOT NULL,
    CONSTRAINT pk_step_times PRIMARY KEY (sweep_id, component_digest, width),
    CONSTRAINT fk_step_times_sweep_id FOREIGN KEY (sweep_id) REFERENCES sweeps (id) ON DELETE CASCADE
){without_rowid};

CREATE TABLE units (
    id {id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_units_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL CONSTRAINT fk_units_environment_digest REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    run_id INTEGER,
    workload_id INTEGER NOT NULL CONSTRAINT fk_units_workload_id REFERENCES workloads (id),
    digest VARCHAR NOT NULL,
    purpose VARCHAR NOT NULL,
    CONSTRAINT uq_units UNIQUE (digest),
    CONSTRAINT fk_units_run_id FOREIGN KEY (run_id) REFERENCES runs (id) ON DELETE SET NULL
);
CREATE INDEX ix_units_target ON units (target_key, environment_digest, measured_at);

CREATE TABLE samples (
    unit_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    setup_id INTEGER NOT NULL CONSTRAINT fk_samples_setup_id REFERENCES setups (id),
    prompt_id INTEGER NOT NULL CONSTRAINT fk_samples_prompt_id REFERENCES prompts (id),
    ttft_s FLOAT NOT NULL,
    decode_s FLOAT NOT NULL,
    output_tokens INTEGER NOT NULL,
    rounds JSON NOT NULL,
    shapes JSON NOT NULL,
    refills INTEGER NOT NULL,
    output_digest VARCHAR NOT NULL,
    disturbed BOOLEAN NOT NULL,
    CONSTRAINT pk_samples PRIMARY KEY (unit_id, position),
    CONSTRAINT fk_samples_unit_id FOREIGN KEY (unit_id) REFERENCES units (id) ON DELETE CASCADE
){without_rowid};

CREATE TABLE infeasible (
    id {id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_infeasible_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL CONSTRAINT fk_infeasible_environment_digest REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    run_id INTEGER,
    workload_id INTEGER NOT NULL CONSTRAINT fk_infeasible_workload_id REFERENCES workloads (id),
    setup_id INTEGER NOT NULL CONSTRAINT fk_infeasible_setup_id REFERENCES setups (id),
    setup JSON NOT NULL,
    reason VARCHAR NOT NULL,
    detail VARCHAR NOT NULL,
    CONSTRAINT fk_infeasible_run_id FOREIGN KEY (run_id) REFERENCES runs (id) ON DELETE SET NULL
);
CREATE INDEX ix_infeasible_target ON infeasible (target_key, environment_digest);

CREATE TABLE policies (
    id {counted_id},
    target_key VARCHAR NOT NULL CONSTRAINT fk_policies_target_key REFERENCES models (key),
    environment_digest VARCHAR NOT NULL CONSTRAINT fk_policies_environment_digest REFERENCES environments (digest),
    created_at VARCHAR NOT NULL,
    generation INTEGER NOT NULL,
    policy TEXT NOT NULL
);
CREATE INDEX ix_policies_target ON policies (target_key, environment_digest, generation);

CREATE TABLE choices (
    policy_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    batch_size INTEGER NOT NULL,
    context_length INTEGER NOT NULL,
    domain VARCHAR NOT NULL,
    temperature FLOAT NOT NULL,
    top_p FLOAT NOT NULL,
    top_k INTEGER NOT NULL,
    setup VARCHAR NOT NULL,
    draft VARCHAR,
    draft_kind VARCHAR,
    k INTEGER NOT NULL,
    basis VARCHAR,
    speedup FLOAT,
    low FLOAT,
    high FLOAT,
    end_to_end FLOAT,
    tok_per_s FLOAT,
    plain_tok_per_s FLOAT,
    proven BOOLEAN NOT NULL,
    reason VARCHAR NOT NULL,
    CONSTRAINT pk_choices PRIMARY KEY (policy_id, position),
    CONSTRAINT fk_choices_policy_id FOREIGN KEY (policy_id) REFERENCES policies (id) ON DELETE CASCADE
){without_rowid};

-- The choices of the newest policy of every target and machine.
CREATE VIEW best AS
SELECT models.name AS target, models.dtype, environments.device, environments.engine, policies.created_at, choices.*
FROM choices
JOIN policies ON policies.id = choices.policy_id
JOIN models ON models.key = policies.target_key
JOIN environments ON environments.digest = policies.environment_digest
WHERE NOT EXISTS (
    SELECT 1
    FROM policies AS newer
    WHERE newer.target_key = policies.target_key
        AND newer.environment_digest = policies.environment_digest
        AND (newer.generation, newer.id) > (policies.generation, policies.id)
);

-- One row for each prompt of each timed run.
CREATE VIEW timed_runs AS
SELECT
    units.run_id, models.name AS target, models.dtype, environments.device, environments.engine,
    workloads.batch_size, workloads.context_length, workloads.temperature, units.purpose,
    setups.name AS setup, setups.draft, setups.draft_kind, setups.k, prompts.domain, prompts.digest AS prompt_digest,
    samples.ttft_s, samples.decode_s, samples.output_tokens,
    CASE WHEN samples.decode_s > 0 THEN (samples.output_tokens - 1) / samples.decode_s END AS tok_per_s,
    samples.disturbed, units.measured_at
FROM samples
JOIN units ON units.id = samples.unit_id
JOIN models ON models.key = units.target_key
JOIN environments ON environments.digest = units.environment_digest
JOIN workloads ON workloads.id = units.workload_id
JOIN setups ON setups.id = samples.setup_id
JOIN prompts ON prompts.id = samples.prompt_id;

-- The share of proposed tokens that the target accepts, by draft and domain.
CREATE VIEW acceptance AS
SELECT
    models.name AS target, models.dtype, traces.draft, prompts.domain, traces.temperature,
    count(*) AS num_prompts, sum(traces.num_accepted) / nullif(sum(traces.num_proposed), 0) AS accept_rate
FROM (
    SELECT target_key, prompt_digest, draft_name AS draft, temperature, num_proposed, num_accepted
    FROM acceptance_traces
    UNION ALL
    SELECT target_key, prompt_digest, draft_name AS draft, temperature, num_proposed, num_accepted
    FROM lookup_traces
) AS traces
JOIN models ON models.key = traces.target_key
LEFT JOIN prompts ON prompts.digest = traces.prompt_digest
GROUP BY models.name, models.dtype, traces.draft, prompts.domain, traces.temperature;

-- Milliseconds of one step at each width; `component` is 'target' or the draft.
CREATE VIEW step_ms AS
SELECT
    sweeps.run_id, models.name AS target, models.dtype, environments.device, environments.engine,
    sweeps.batch_size, sweeps.context_length,
    CASE WHEN step_times.component_digest = sweeps.target_key THEN 'target' ELSE step_times.component END AS component,
    step_times.width, 1000 * step_times.median_s AS median_ms, step_times.disturbed, sweeps.measured_at
FROM step_times
JOIN sweeps ON sweeps.id = step_times.sweep_id
JOIN models ON models.key = sweeps.target_key
JOIN environments ON environments.digest = sweeps.environment_digest;

-- What could not be measured, and why.
CREATE VIEW failures AS
SELECT
    infeasible.run_id, models.name AS target, models.dtype, environments.device, environments.engine,
    workloads.batch_size, workloads.context_length, setups.name AS setup, setups.draft, setups.draft_kind, setups.k,
    infeasible.reason, infeasible.detail, infeasible.measured_at
FROM infeasible
JOIN models ON models.key = infeasible.target_key
JOIN environments ON environments.digest = infeasible.environment_digest
JOIN workloads ON workloads.id = infeasible.workload_id
JOIN setups ON setups.id = infeasible.setup_id;

-- What each run measured, and what a grid over all setups would have taken.
CREATE VIEW run_costs AS
SELECT
    runs.id AS run_id, models.name AS target, models.dtype, environments.device, environments.engine,
    runs.started_at, runs.finished_at, runs.measured_seconds, runs.measured_units, runs.reused_units,
    runs.grid_seconds_estimate, runs.engine_starts, runs.starting_seconds
FROM runs
JOIN models ON models.key = runs.target_key
JOIN environments ON environments.digest = runs.environment_digest;
