"""What configs of one kind have in common; common.py has what all do."""
