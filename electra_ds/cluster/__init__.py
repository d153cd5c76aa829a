"""Launchers, watchdog and run folder."""
