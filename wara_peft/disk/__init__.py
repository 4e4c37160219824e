"""An adapter on disk, checkpoints, merging shard by shard, directories that appear whole; nothing read is trusted."""
