"""Records, checks, the joint dataset, batches."""
