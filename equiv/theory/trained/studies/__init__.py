"""One study per file; see `equiv/theory/trained/study.py`."""
