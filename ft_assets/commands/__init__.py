"""The bodies of the `ft` commands. The modules of cli/ parse their options and print."""
