"""Famous bugs of other engines, planted in ours; each must be seen by a test named beside it."""
