"""The frozen result, one file per rendering."""
