"""`m3 eval`: how much of its context a model really uses on this machine."""
