"""Training with labels: a resumable loop, schedules, augmentation."""
