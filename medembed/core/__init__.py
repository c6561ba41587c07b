"""What every floor stands on: errors, files, system, text."""
