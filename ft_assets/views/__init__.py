"""What commands and pages show of a project, as frozen types. Nothing here changes anything."""
