"""Run configs and engine files: schema, loading, differences."""
