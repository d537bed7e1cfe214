"""Rewards: the protocol that they follow and the ways to make one."""
