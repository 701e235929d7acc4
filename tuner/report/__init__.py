"""Says what was decided and measured: tables, JSON, pictures, a page.

`build` fills report data from a run, `page` writes the page; both are imported where they are needed.
"""

from tuner.report.charts import ChartRow, bar_chart
from tuner.report.data import ReportData
from tuner.report.tables import answer, document, table

__all__ = ["ChartRow", "ReportData", "answer", "bar_chart", "document", "table"]
