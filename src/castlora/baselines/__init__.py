"""Methods of others, one file each, to compare with on the same pairing, text and test items.

Those that need weights alone are pure functions of one branch's update and weights; `carry.py` applies them to all
modules of a pairing.
"""
