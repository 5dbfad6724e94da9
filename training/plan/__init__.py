"""``main.py --plan``: what a run would cost, before it is started."""
