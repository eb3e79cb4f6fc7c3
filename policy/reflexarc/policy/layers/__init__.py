"""Parts that the policy families share."""
