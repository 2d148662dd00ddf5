"""The paper's tables and figures, and controls beyond them, each by one command.

`cells.py` has the units of work, `study.py` says which cells a study has, `compare.py` turns their
scores into tables, `catalogue.py` lists the experiments, `report.py` writes them down.
"""
