"""Membership of a job whose workers come and go while it trains.

`membership.Membership` is the pure state machine that decides who takes part in which round, `service` serves it over
TCP, `client.MembershipClient` is a trainer's side of it, and `messages` are the lines that the two exchange.
"""
