"""Data sets as they are distributed -> one folder in one format; `docs/data.md` describes both.

`types.py` says what a data set is: a function from its source to a stream of rows, rows left out
and rows that cannot be used. One module a data set (`vqa_rad.py`, ...) reads the original files;
`write.py` does the rest for all of them: images (`pictures.py`), rows, counts (`counts.py`),
problems, licence, summary and contact sheet (`sheet.py`). `__main__.py` is the command line.
"""
