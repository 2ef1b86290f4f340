"""The demo: a small base model trained by this project, its upstream text, its tasks, and the whole path on them."""
