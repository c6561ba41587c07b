"""The report page, its figures and tables."""
