"""The `jclt` command."""
