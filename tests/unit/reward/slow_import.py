"""A reward module that takes for ever to load."""

import time

time.sleep(600)
