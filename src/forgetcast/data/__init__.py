"""What goes in: pools, tasks and recipes."""
