"""What `ft init`, `ft status`, `ft gc` and `ft doctor` do: a module a command. cli.py only reads their flags and prints."""
