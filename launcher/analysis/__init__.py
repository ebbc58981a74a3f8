"""What the metrics of a finished or running run say about it.

`run_profile.compute_profile` computes the typical update of a run from its metrics. `explain` finds what limits it, or
why one of two runs is faster, and `advice` what to change. `html_report.render_report` makes the HTML page and
`csv_export.format_csv` the CSV file. `point_metrics` reads what a sweep needs to know of each point, and `best_points`
names the fastest and the most accurate one, for the terminal and, in `html_comparison`, for the page. `html_page`,
`html_style` and `svg_charts` draw the pages, also that of `tune`.
"""
