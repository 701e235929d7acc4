"""Step times of a workload that samples are told apart; sweeps that are there timed greedy choices."""

from alembic import op
from sqlalchemy import Column, String

revision = "0006"
down_revision = "0005"

STEP_MS = """CREATE VIEW step_ms AS
SELECT
    sweeps.run_id, models.name AS target, models.dtype, environments.device, environments.engine,
    sweeps.batch_size, sweeps.context_length, sweeps.sampling,
    CASE WHEN step_times.component_digest = sweeps.target_key THEN 'target' ELSE step_times.component END AS component,
    step_times.width, 1000 * step_times.median_s AS median_ms, step_times.disturbed, sweeps.measured_at
FROM step_times
JOIN sweeps ON sweeps.id = step_times.sweep_id
JOIN models ON models.key = sweeps.target_key
JOIN environments ON environments.digest = sweeps.environment_digest"""


def upgrade() -> None:
    op.add_column("sweeps", Column("sampling", String))
    op.execute("DROP VIEW step_ms")
    op.execute(STEP_MS)
