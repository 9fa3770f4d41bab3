"""Entry points of the commands in a checkout, one file per command, and scripts that run them."""
