"""What the experiment `serve` reads, and how its model comes about."""
