"""The commands in a checkout, one file each, and the scripts that start them."""
