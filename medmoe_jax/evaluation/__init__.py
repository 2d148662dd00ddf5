"""How good answers are: from rows and predictions to one report (`report.report`).

`rows` pairs, `figures`, `classification`, `confidence` and `controls` measure, all with the
intervals of `bootstrap`; `text` and `plots` show what was found.
"""
