"""Stock modules run in bands of rows, within a budget of memory; no pipeline is known here."""
