"""Says what was decided and measured: tables, JSON, pictures, a page.

The names here are light; `assemble` (fills a dossier from a run) and `page` (writes it) are imported by who needs them.
"""

from tuner.report.charts import ChartRow, bar_chart
from tuner.report.data import ReportData
from tuner.report.tables import answer, document, table

__all__ = ["ChartRow", "ReportData", "answer", "bar_chart", "document", "table"]
