"""`launcher verify`: check that splitting the batch gives the same gradient."""

from __future__ import annotations

import json
from collections.abc import Sequence

from launcher.cli.arguments import handle_info_flags, resolve_config
from launcher.config.cli_args import HydraArgs
from launcher.errors import EXIT_FAILED, EXIT_OK

__all__ = ["run_verify"]


def run_verify(args: Sequence[str]) -> int:
    """Check that splitting the batch gives the same gradient; exit 1 if it does not and no layer explains it."""
    if handle_info_flags(HydraArgs.parse(args), args):
        return EXIT_OK
    config = resolve_config(args)
    from launcher.train import verify

    result = verify.verify(config)
    print(json.dumps(result.to_document()) if config.format == "json" else verify.format_verify_result(result).rstrip())
    return EXIT_OK if result.is_acceptable else EXIT_FAILED
