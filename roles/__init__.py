"""The Ray side: one thin actor a role, and the driver that joins them. What is true without Ray is in rlpipe."""
