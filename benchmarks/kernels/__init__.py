"""The operations of the backward, one by one."""
