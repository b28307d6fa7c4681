"""The command line: `otprune …`, the same as `optimum-cli otprune …`."""
