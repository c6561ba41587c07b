"""Scores, confidence intervals and calibration."""
