-- The first schema: models, environments, evidence, runs and policies.

CREATE TABLE models (
    key VARCHAR NOT NULL CONSTRAINT pk_models PRIMARY KEY,
    name VARCHAR NOT NULL,
    revision VARCHAR,
    dtype VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,
    num_params INTEGER NOT NULL
);

CREATE TABLE environments (
    digest VARCHAR NOT NULL CONSTRAINT pk_environments PRIMARY KEY,
    device VARCHAR NOT NULL,
    device_count INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    driver VARCHAR,
    cuda VARCHAR,
    threads INTEGER NOT NULL,
    torch VARCHAR NOT NULL,
    engine VARCHAR NOT NULL,
    engine_version VARCHAR NOT NULL
);

CREATE TABLE target_traces (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    sampling_digest VARCHAR NOT NULL,
    prompt_digest VARCHAR NOT NULL,
    token_ids JSON NOT NULL,
    target_probs JSON NOT NULL,
    logit_gaps JSON NOT NULL,
    ended BOOLEAN NOT NULL,
    CONSTRAINT uq_target_traces UNIQUE (target_key, sampling_digest, prompt_digest)
);

CREATE TABLE acceptance_traces (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    sampling_digest VARCHAR NOT NULL,
    prompt_digest VARCHAR NOT NULL,
    draft_digest VARCHAR NOT NULL,
    draft_name VARCHAR NOT NULL,
    keep_probs JSON NOT NULL,
    confidences JSON NOT NULL,
    CONSTRAINT uq_acceptance_traces UNIQUE (target_key, sampling_digest, prompt_digest, draft_digest)
);

CREATE TABLE lookup_traces (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    sampling_digest VARCHAR NOT NULL,
    prompt_digest VARCHAR NOT NULL,
    draft_digest VARCHAR NOT NULL,
    draft_name VARCHAR NOT NULL,
    max_length INTEGER NOT NULL,
    proposed JSON NOT NULL,
    kept JSON NOT NULL,
    CONSTRAINT uq_lookup_traces UNIQUE (target_key, sampling_digest, prompt_digest, draft_digest, max_length)
);

CREATE TABLE step_times (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    sweep VARCHAR NOT NULL,
    part_digest VARCHAR NOT NULL,
    part_name VARCHAR NOT NULL,
    batch_size INTEGER NOT NULL,
    context_length INTEGER NOT NULL,
    max_length INTEGER NOT NULL,
    samples_s JSON NOT NULL,
    disturbed BOOLEAN NOT NULL,
    CONSTRAINT uq_step_times UNIQUE (sweep, part_digest)
);

CREATE TABLE samples (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    unit VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    anchor_digest VARCHAR NOT NULL,
    occasion VARCHAR NOT NULL,
    setup_digest VARCHAR NOT NULL,
    setup_name VARCHAR NOT NULL,
    prompt_digest VARCHAR NOT NULL,
    ttft_s FLOAT NOT NULL,
    decode_s FLOAT NOT NULL,
    output_tokens INTEGER NOT NULL,
    rounds JSON NOT NULL,
    output_digest VARCHAR NOT NULL,
    peak_memory_bytes INTEGER,
    disturbed BOOLEAN NOT NULL,
    CONSTRAINT uq_samples UNIQUE (unit, position)
);

CREATE TABLE infeasible (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    measured_at VARCHAR NOT NULL,
    anchor_digest VARCHAR NOT NULL,
    setup_digest VARCHAR NOT NULL,
    setup JSON NOT NULL,
    reason VARCHAR NOT NULL,
    detail VARCHAR NOT NULL
);

CREATE TABLE runs (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    started_at VARCHAR NOT NULL,
    finished_at VARCHAR,
    workload JSON NOT NULL,
    outcome JSON
);

CREATE TABLE policies (
    id {id},
    target_key VARCHAR NOT NULL REFERENCES models (key),
    environment_digest VARCHAR NOT NULL REFERENCES environments (digest),
    created_at VARCHAR NOT NULL,
    policy TEXT NOT NULL
);
