"""The commands that read the metrics of runs: `launcher explain`, `launcher report` and `launcher export`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.arguments import print_notes
from launcher.config.cli_args import ReportArgs
from launcher.errors import EXIT_OK, UsageError
from launcher.system.atomic_files import atomic_write_text

__all__ = ["run_explain", "run_export", "run_report"]


def run_explain(args: Sequence[str]) -> int:
    """Report what limits a run, or why one of two runs is faster, from their metrics."""
    parsed = ReportArgs.parse("explain", args, json=True)
    if len(parsed.paths) not in (1, 2):
        raise UsageError(
            f"explain {' '.join(parsed.paths)}: type launcher explain RUN, or launcher explain RUN_A RUN_B"
        )
    from launcher.analysis import explain
    from launcher.analysis.run_profile import compute_profile
    from launcher.run_dir.metrics_reader import read_run_metrics

    runs = [read_run_metrics(path) for path in parsed.paths]
    print_notes(run.describe_unreadable() for run in runs)
    profiles = [compute_profile(run) for run in runs]
    document = explain.compare_runs(*profiles) if len(profiles) > 1 else explain.explain_run(profiles[0])
    print(json.dumps(document) if parsed.json else explain.format_explanation(document).removesuffix("\n"))
    return EXIT_OK


def run_report(args: Sequence[str]) -> int:
    """Write a self-contained HTML report about one run, or comparing several."""
    parsed = ReportArgs.parse("report", args, output=True)
    if not parsed.paths:
        raise UsageError("report: type launcher report RUN..., or launcher report RUN... -o FILE.html")
    from launcher.analysis.html_report import render_report
    from launcher.analysis.run_report import choose_output_path, load_reports

    runs = list(load_reports(parsed.paths))
    print_notes(run.history.describe_unreadable() for run in runs)
    page = render_report(runs)
    if parsed.output is None:
        write_in_run_directory(choose_output_path(parsed.paths), page)
    else:
        write_output_file(Path(parsed.output), page)
    return EXIT_OK


def run_export(args: Sequence[str]) -> int:
    """Write the metrics of a run as CSV."""
    parsed = ReportArgs.parse("export", args, output=True)
    if len(parsed.paths) != 1:
        raise UsageError(
            f"export {' '.join(parsed.paths)}: type launcher export RUN, or launcher export RUN -o FILE.csv"
        )
    from launcher.analysis.csv_export import format_csv
    from launcher.run_dir.metrics_reader import read_run_metrics

    run = read_run_metrics(parsed.paths[0])
    print_notes([run.describe_unreadable()])
    if parsed.output is None:
        print(format_csv(run.rows), end="")
    else:
        write_output_file(Path(parsed.output), format_csv(run.rows))
    return EXIT_OK


def write_in_run_directory(file: Path, text: str) -> None:
    """Write the file atomically and print its path; a link of that name is replaced, not followed."""
    try:
        atomic_write_text(file, text)
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}): type -o FILE") from error
    print(file)


def write_output_file(file: Path, text: str) -> None:
    """Write the file atomically and print its path; write directly into an existing link, pipe or device."""
    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            file.write_text(text, encoding="utf-8")
            return
        atomic_write_text(file, text)
    except OSError as error:
        raise UsageError(f"-o {file} cannot be written ({error.strerror}): type another -o FILE") from error
    print(file)
