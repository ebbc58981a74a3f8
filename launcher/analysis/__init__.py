"""Finished or running runs, read from their files: explain, report, CSV export, advice."""
