"""What a user would have without a search: the fixed network, trained and measured by the same rules."""
