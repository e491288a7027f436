"""The run report: one HTML page that stands alone, made from a run folder by `promptfed.report.build.build_report`."""
