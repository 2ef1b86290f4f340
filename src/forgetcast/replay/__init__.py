"""What to mix into a fine-tune: signals, strategies, plans, exports, and the law of ratios."""
