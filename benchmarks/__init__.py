"""Scripts that measure: each prints a table, writes JSON, draws a plot. Never imported by the other rooms."""
