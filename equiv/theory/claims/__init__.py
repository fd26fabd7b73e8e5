"""The claims of the theory, one file each, found by number.

A new one is `claim_NN_what_it_says.py` with `@claim(NN, title=…, formula=…, …)` on one
function, which asks for what it needs by the names of its parameters (see
`equiv/theory/setting.py`) and returns a `ClaimResult`. What it compares is in functions
of its own beside it, so that a test can break them and see the verdict change.

`proofs/check.py` reads `title` and `as_written` without running anything, so both are
literals. It asks for a test in `tests/test_theory_*.py` with `@pytest.mark.claim(NN)`;
`check.py --index` writes the link into `proofs/README.md`.
"""
