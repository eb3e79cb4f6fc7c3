"""The policy families and the parts that they share."""
