"""The command line, one module per command or group of commands.

`main.main` is the entry point: it selects the command in `main.VERBS` and turns errors into messages and exit statuses.
`train`, `plan`, `tune` and `verify` take a configuration; `reports` (explain, report, export), `control` (stop, status)
and `watch` take a run; `doctor` checks the machine; `new_recipe` writes a recipe; `internal` has the commands that the
launcher itself calls. `arguments` has what they share. No command's module is imported before it is needed.
"""
