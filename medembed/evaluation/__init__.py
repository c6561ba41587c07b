"""Scores, intervals, calibration: what a number is worth."""
