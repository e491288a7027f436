"""Metrics, calibration and paired comparison of runs."""
