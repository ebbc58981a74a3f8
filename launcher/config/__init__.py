"""The configuration: from the command line to a validated, frozen `RunConfig`.

`schema.RunConfig` has every key with its type, default and documentation. `compose.resolve` composes it with Hydra from
the files of conf/, the user's own folders and the overrides; `keys.from_mapping` builds it from plain values, which
`coercion.coerce` converts. `limits.LIMITS` has the numbers that each key allows, `validation.validate_composed` and
`consistency.validate_for_plan` refuse what is wrong, in one line that names the key, its value and what to type.
"""
