"""What nodes say to each other and decide. No I/O, no clock, no globals.

Everything here is plain deterministic Python that a driver feeds with events and that answers with effects. The daemon
(`p2pnode`) and the simulator (`simulations`) drive the very same code. Nothing in this package imports anything of ours
outside it; `tests/test_tidy.py` holds that.
"""
