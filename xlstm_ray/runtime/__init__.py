"""What computes: the blocks' functions, a shard's worker, and the executor of this process."""
