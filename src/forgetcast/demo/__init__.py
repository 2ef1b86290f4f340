"""The demo: a small base model trained by this project, its upstream text and tasks, and the complete workflow."""
