"""Parts of the experiment `latency`."""
