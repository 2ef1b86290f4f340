"""Many models: the forgetting matrix, in memory and on disk."""
