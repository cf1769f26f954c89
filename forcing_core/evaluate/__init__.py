"""Measure the micro model: captions of the generated world, rolled out under several settings, judged from pixels.

`settings.py` says what is compared, `run.py` makes and measures the videos, `ablations.py` reads the published claims
off the rows, `tables.py` and `plots.py` show them.
"""
