"""From the command line to a validated, frozen RunConfig; the only package that knows Hydra."""
