"""The YAML files of the configuration: the defaults, and the choices of each group in its folder."""
