"""What `launcher tune` reports.

`document.make_tune_document` makes the JSON document from the measurements; `text` and `html` render it for a terminal
and as a page, and `sweep_table` that of `tune -m`.
"""
