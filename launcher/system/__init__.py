"""Files, processes, signals, text and secrets: building blocks that know nothing about training.

Most used: `atomic_files.atomic_write_text`, `jsonl.JsonlReader`, `stderr.print_stderr`, `redaction.mask_secrets` and
the formatters of `formatting`. `run_files` has the names of the files that the other packages read and write.
"""
