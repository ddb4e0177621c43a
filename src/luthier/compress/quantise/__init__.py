"""Fewer bits for a weight: schemes, rounding, calibration, formats, and what it costs, measured."""
