"""What several jobs share: checks, inputs, stages, rows, reports."""
