"""One model or two: scores, their difference, and other tools' logs."""
