"""The command line, one module a verb; `nestling.jobs.app` puts them together."""
