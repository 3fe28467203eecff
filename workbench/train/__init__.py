"""Losses, optimizer, schedules, the training loop as a generator of events, recipes."""
