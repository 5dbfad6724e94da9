"""Faults that are put into the code one at a time, to see which test catches each."""
